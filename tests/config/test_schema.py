"""The keys of the YAML: documented, with defaults, and safe in what they may hold."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from distopt.config import ConfigError, RunConfig, dump_yaml, parse_config
from distopt.config.plugins import REFERENCE_PATTERN
from distopt.config.schema import CODE_KEYS
from tests.config.sources import MINIMAL, SOURCE, problems


def test_minimal_config_has_every_default():
    config = parse_config(MINIMAL)
    assert (str(config.run_dir), config.seed, config.launch.platform) == ("runs/flights", 1, "local")
    assert config.optim.clip.args() == {}


def test_every_key_has_a_description():
    def undocumented(schema: dict) -> list[str]:
        sections = [schema, *schema["$defs"].values()]  # a $ref repeats the description of the section it names
        return [
            name
            for each in sections
            for name, key in each["properties"].items()
            if not {"description", "$ref"} & set(key)
        ]

    assert undocumented(RunConfig.model_json_schema()) == []


def test_off_and_graph_are_modes_of_capture():
    assert parse_config(MINIMAL + "train: {capture: off}\n").train.capture == "off"
    assert parse_config(MINIMAL, ["train.capture=off"]).train.capture == "off"
    assert parse_config(MINIMAL, ["train.capture=graph"]).train.capture == "graph"
    assert problems(MINIMAL, "train.capture=true") != []
    assert parse_config(MINIMAL, ["train.compile_from_step=5"]).train.compile_from_step == 5
    assert "expected auto" in problems(MINIMAL, "train.compile_from_step=5", "train.capture=graph")[0]
    assert "train.precision" in problems(MINIMAL, "train.compile_from_step=5", "train.precision=bf16")[0]


@pytest.mark.parametrize(
    "name", ["../../x", "a..b", "-rf", "a\nb", "", ".hidden", "a/b", "a b", "x" * 65, "x" * 300, "a;rm", "naïve"]
)
def test_run_name_that_could_leave_its_folder_or_be_an_option_is_refused(name):
    assert "name: " in problems(f"name: {json.dumps(name)}\nscript: x")[0]


@pytest.mark.parametrize("task", ["os:system", "builtins:eval", "a.b", "a:__init__", "a:b.c", "a b:c", "a:b()", ":x"])
def test_task_that_is_no_class_of_a_package_is_refused(task):
    assert problems(f"name: a\ntask: '{task}'")[0].startswith(f"{SOURCE}: task: ")


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("task: mytasks:House\noptim: {name: mytasks.optim:Sophia}", True),
        ("task: mytasks:House\noptim: {name: evil:Sophia}", False),
        ("task: mytasks:House\noptim: {scheduler: {name: evil:Sophia}}", False),
        ("task: mytasks:House\ntrain: {loss: evil:Loss}", False),
        ("task: mytasks:House\nlog: {loggers: [mytasks:Logger, evil:Logger]}", False),
        ("task: mytasks.house:House", True),
        ("task: distopt.examples.flights:Flights", True),
        ("task: mytasksevil.house:House", False),
        ("task: evil:House", False),
        ("script: train.py", False),
    ],
)
def test_only_tasks_of_declared_packages_are_taken_where_some_are_declared(text, allowed, monkeypatch):
    monkeypatch.setenv("DISTOPT_TRUSTED_TASKS", "mytasks,distopt.examples")
    if allowed:
        parse_config(f"name: run\n{text}")
        return
    with pytest.raises(ConfigError, match="allows only code of mytasks, distopt.examples"):
        parse_config(f"name: run\n{text}")


def test_code_of_the_user_is_listed_with_its_key():
    optim = "optim={name: mine:Sophia, scheduler: {name: mine.rates:Warm}}"
    config = parse_config(MINIMAL, [optim, "log.loggers=[mine:A, {name: mine:B, args: {url: x}}]"])
    assert config.references() == [
        ("task", "distopt.examples.flights:Flights"),
        ("optim.name", "mine:Sophia"),
        ("optim.scheduler.name", "mine.rates:Warm"),
        ("log.loggers", "mine:A"),
        ("log.loggers", "mine:B"),
    ]
    assert parse_config(dump_yaml(config)) == config


def test_every_key_that_may_name_code_is_listed():
    def sections(schema: dict, section: dict, prefix: str = "") -> Iterator[tuple[str, dict]]:
        for name, field in section["properties"].items():
            yield prefix + name, field
            for reference in re.findall(r"'#/\$defs/(\w+)'", str(field)):
                yield from sections(schema, schema["$defs"][reference], f"{prefix}{name}.")

    schema = RunConfig.model_json_schema()
    keys = [key for key, field in sections(schema, schema) if repr(REFERENCE_PATTERN) in str(field)]
    assert {key.replace("loggers.name", "loggers") for key in keys} == set(CODE_KEYS)


def test_config_imports_neither_torch_nor_pyro():
    code = "import sys, distopt.config; sys.exit(bool({'torch', 'pyro'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0

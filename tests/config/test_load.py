"""From YAML and overrides to a RunConfig, or to one error that names every mistake and what mends it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distopt.config import ConfigError, RunConfig, dump_yaml, load_config, parse_config
from distopt.config.plugins import REFERENCE_PATTERN
from distopt.config.schema import CODE_KEYS

MINIMAL = "name: flights\ntask: distopt.examples.flights:Flights\n"
BOMB = "a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{','.join([f'*a{i}'] * 9)}]\n" for i in range(9))
SOURCE = "configs/flights.yaml"


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, overrides, source=SOURCE)
    return caught.value.problems


def test_minimal_config_has_every_default():
    config = parse_config(MINIMAL)
    assert (str(config.run_dir), config.seed, config.launch.platform) == ("runs/flights", 1, "local")
    assert config.optim.clip.args() == {}


def test_every_key_has_a_description():
    def undocumented(schema: dict) -> list[str]:
        sections = [schema, *schema["$defs"].values()]  # a $ref repeats the description of the section it names
        return [
            name
            for part in sections
            for name, key in part["properties"].items()
            if not {"description", "$ref"} & set(key)
        ]

    assert undocumented(RunConfig.model_json_schema()) == []


def test_dumped_config_reads_back_equal():
    config = parse_config(MINIMAL, ["optim.args={lr: 1e-3, betas: [0.9, 0.99]}", "launch.env={A: 1, B: 'é \"x\"'}"])
    assert parse_config(dump_yaml(config)) == config


def test_overrides_replace_keys_and_are_typed_as_yaml():
    config = parse_config(
        MINIMAL, ["train.num_steps=7", "optim.args.lr=1e-3", "launch.hosts=[a, b]", "data.global_batch=null"]
    )
    assert config.train.num_steps == 7
    assert config.optim.args == {"lr": 0.001}
    assert config.launch.hosts == ["a", "b"]
    assert config.data.global_batch is None


def test_bare_off_and_graph_are_modes_of_capture():
    assert parse_config(MINIMAL + "train: {capture: off}\n").train.capture == "off"
    assert parse_config(MINIMAL, ["train.capture=off"]).train.capture == "off"
    assert parse_config(MINIMAL, ["train.capture=graph"]).train.capture == "graph"
    assert problems(MINIMAL, "train.capture=true") != []


def test_interpolation_sees_overrides():
    config = parse_config(MINIMAL + "run_dir: /data/${name}/${seed}\n", ["seed=5"])
    assert str(config.run_dir) == "/data/flights/5"


def test_unknown_key_is_answered_in_the_form_of_the_style_guide():
    assert problems(MINIMAL + "reduce: {bucket_mb: 3}") == [
        "configs/flights.yaml: reduce.bucket_mb: unknown key. Did you mean reduce.bucket_mib? "
        "Known: backend, backward_passes_per_step, bucket_mib, compression, drift_every_steps, "
        "gradient_predivide_factor, groups, op, overlap, power_sgd_rank, sparse_as_dense, timeout_s."
    ]


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        ("bucket_mib: 3", "bucket_mib: unknown key. Did you mean reduce.bucket_mib?"),
        (
            "optim: {scheduler: {name: StepLR, nam: x}}",
            "optim.scheduler.nam: unknown key. Did you mean optim.scheduler.name?",
        ),
        ("train: {num_steps: many}", "train.num_steps: found 'many' (str), expected an integer."),
        ("train: {num_steps: true}", "train.num_steps: found True (bool), expected an integer."),
        ("seed: '3'", "seed: found '3' (str), expected an integer."),
        ("launch: {workers: 0}", "launch.workers: found 0 (int), expected a number greater than or equal to 1."),
        ("script: ''", "script: found '' (str), expected a string with at least 1 character."),
        ("launch: {platform: torchrn}", "Did you mean torchrun?"),
        ("train: {loss: TraceELBO}", "Did you mean Trace_ELBO?"),
        ("optim: {name: Adamm}", "SGD, SparseAdam or module:Name of your own code, such as mypackage.module:MyClass."),
        ("optim: {name: Adamm}", "Did you mean Adam?"),
        ("optim: {name: os:system}", "optim.name: found os:system, but os belongs to Python's standard library"),
        ("optim: {scheduler: {name: Exponential}}", "Did you mean ExponentialLR?"),
        ("log: {loggers: mine:A}", "log.loggers: found 'mine:A' (str), expected a list."),
        ("log: {loggers: [mine:A, mine]}", "log.loggers.1.name: found 'mine' (str), expected module:Name of your own"),
        (
            "log: {loggers: [{name: mine:A, nam: x}]}",
            "log.loggers.0.nam: unknown key. Did you mean log.loggers.0.name?",
        ),
        ("checkpoint: {resume: [1]}", "checkpoint.resume: found [1] (list), expected an integer or a string."),
        ("script: train.py", "found both of task and script"),
        ("script_args: [a]", "found script_args without script"),
        ("launch: {env: {A: [1]}}", "launch.env.A: found [1] (list), expected a string."),
        ("launch: {env: {API_KEY: x}}", "launch.secrets: [API_KEY]"),
        ("seed: ${oc.env:HF_TOKEN}", "name it in launch.secrets: [HF_TOKEN]"),
        ("seed: ${nowhere.at.all}", "seed: Interpolation key 'nowhere.at.all' not found"),
        ("train:", "train: found nothing (null), expected a mapping."),
        ("name: again", "line 3, column 1: the key 'name' appears twice"),
        ("optim: {args: {lr: .nan}, clip: {clip_norm: .inf}}", "optim.clip.clip_norm: found inf (float)"),
    ],
)
def test_mistake_names_file_key_found_and_expected(yaml, said):
    (problem,) = problems(MINIMAL + yaml)
    assert problem.startswith(SOURCE + ": ")
    assert said in problem


def test_all_mistakes_come_at_once_and_those_of_the_command_line_say_so():
    found = problems(MINIMAL + "sed: 1\nlog: {every_steps: -1}", "launch.wokers=2", "train.num_steps=x")
    assert len(found) == 4
    assert [text for text in found if text.startswith("command line: ")] == [
        text for text in found if "wokers" in text or "num_steps" in text
    ]


@pytest.mark.parametrize("override", ["seed", "=1", "--seed=1", "a b=1", "launch.hosts=[a"])
def test_override_that_is_none_is_quoted(override):
    (problem,) = problems(MINIMAL, override)
    assert problem.startswith(f"{override!r} on the command line: ")


@pytest.mark.parametrize(
    "name", ["../../x", "a..b", "-rf", "a\nb", "", ".hidden", "a/b", "a b", "x" * 65, "x" * 300, "a;rm", "naïve"]
)
def test_run_name_that_could_leave_its_folder_or_be_an_option_is_refused(name):
    import json

    assert "name: " in problems(f"name: {json.dumps(name)}\nscript: x")[0]


@pytest.mark.parametrize("task", ["os:system", "builtins:eval", "a.b", "a:__init__", "a:b.c", "a b:c", "a:b()", ":x"])
def test_task_that_is_no_class_of_a_package_is_refused(task):
    assert problems(f"name: a\ntask: '{task}'")[0].startswith(f"{SOURCE}: task: ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x: !!python/object/apply:os.system ['touch canary']", "could not determine a constructor for the tag"),
        (BOMB, "values once its aliases are written out"),
        ("a: &a [1]\nb: [" + ",".join(["*a"] * 200) + "]", "more than 100 aliases"),
        ("a: &a [*a]", "an alias refers to what contains it"),
        ("[" * 5000, "nested more than 32 levels deep"),
        ("a: " + "x" * 2_000_000, "bytes, no configuration is that long"),
        ("a: \x00", "special characters are not allowed"),
        ("", "found nothing (null), expected a mapping"),
        ("- 1", "found [1] (list), expected a mapping"),
    ],
)
def test_hostile_document_is_refused_before_it_is_built(text, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in problems(text)[0]
    assert list(tmp_path.iterdir()) == []


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


def test_missing_file_is_answered_with_the_nearest(tmp_path):
    (tmp_path / "flights.yaml").write_text(MINIMAL)
    with pytest.raises(ConfigError, match=r"flihgts\.yaml: no such file\. Did you mean .*flights\.yaml\?"):
        load_config(tmp_path / "flihgts.yaml")


@given(st.dictionaries(st.text(max_size=8), st.text(max_size=8) | st.integers() | st.lists(st.integers()), max_size=4))
def test_any_mapping_gives_a_config_or_a_config_error(raw):
    import yaml

    try:
        parse_config(yaml.safe_dump(raw))
    except ConfigError as error:
        assert error.problems


def test_config_imports_neither_torch_nor_pyro():
    code = "import sys, distopt.config; sys.exit(bool({'torch', 'pyro'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0

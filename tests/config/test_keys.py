"""Every key of the YAML is explained: none is missing, examples load, and explained YAML is the same configuration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from distopt.config import RunConfig, all_keys, dump_yaml, explain_yaml, load_config, parse_config
from distopt.launch.cli import app
from tests.config.sources import MINIMAL

KEYS = {key.name: key for key in all_keys()}
FULL = """
name: full
task: mytasks:House
train: {validate_every_steps: 10, early_stopping: {metric: rmse}}
optim: {scheduler: {name: StepLR, args: {step_size: 3}}, args_by_name: {"*.bias": {lr: 0.1}}}
checkpoint: {keep_best: {metric: rmse, mode: max}, resume_only: [params]}
log: {loggers: ["mine:Logger", {name: "mine:B", args: {text: "a: b #c\\n d"}}]}
launch:
  kubernetes: {volumes: [{claim: a, path: /x}], secrets: {TOKEN: {secret: s, key: k}}}
  env: {A: "${oc.env:HOME}"}
"""


def names_of(schema: dict[str, Any], section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Yields the keys of a JSON schema, named as `Key.name`, and whether each is required."""
    for name, field in section.get("properties", {}).items():
        yield f"{prefix}{name}", name in section.get("required", ()) and name != "run_dir"  # which has a default
        for deeper, suffix in sections_of(schema, field):
            yield from names_of(schema, deeper, f"{prefix}{name}{suffix}.")


def sections_of(schema: dict[str, Any], field: Any) -> Iterator[tuple[dict[str, Any], str]]:
    if "$ref" in field:
        yield schema["$defs"][field["$ref"].rpartition("/")[2]], ""
    for each in field.get("anyOf", ()):
        yield from sections_of(schema, each)
    for where, suffix in (("items", "[]"), ("additionalProperties", ".*")):
        if isinstance(field.get(where), dict):
            yield from ((deeper, suffix) for deeper, _ in sections_of(schema, field[where]))


def test_no_key_of_the_schema_is_missing() -> None:
    schema = RunConfig.model_json_schema()
    assert [(key.name, key.default is None) for key in KEYS.values()] == list(names_of(schema, schema))


def test_every_key_has_a_meaning_and_an_example() -> None:
    for key in KEYS.values():
        assert key.text.endswith("."), key.name
        assert key.example or key.is_section, f"{key.name}: add one to _EXAMPLES of distopt/config/keys.py"


NEEDED = {
    "script": {"task": None},
    "script_args": {"task": None, "script": "train.py"},
    "train.early_stopping": {"train.validate_every_steps": 100},
    "checkpoint.keep_best": {"train.validate_every_steps": 100},
    "launch.min_hosts": {"launch.nodes": 2},
    "launch.kubernetes.volumes[].path": {"launch.kubernetes.volumes[].claim": "runs"},
    "launch.kubernetes.volumes[].sub_path": {"launch.kubernetes.volumes[].claim": "runs"},
    "launch.kubernetes.volumes[].read_only": {"launch.kubernetes.volumes[].claim": "runs"},
    "launch.kubernetes.volumes[].storage_class": {"launch.kubernetes.volumes[].ephemeral": "10Gi"},
}
"""What else a key needs, beside what its section requires."""


@pytest.mark.parametrize("name", [name for name, key in KEYS.items() if not key.is_section])
def test_example_of_a_key_is_one_that_a_yaml_may_have(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hosts.txt").write_text("node1\nnode2 slots=4\n")
    values: dict[str, Any] = {"name": "run", "task": "mytasks:House"}
    for prefix, others in NEEDED.items():
        if name.startswith(prefix):
            for other, value in others.items():
                set_in(values, path_of(other), value)
    section = name.rpartition(".")[0]
    siblings = [key for key in KEYS.values() if section and key.name.rpartition(".")[0] == section]
    for key in [*(each for each in siblings if each.default is None), KEYS[name]]:
        set_in(values, path_of(key.name), yaml.safe_load(key.example))
    assert dump_yaml(parse_config(yaml.safe_dump(values)))


def path_of(name: str) -> list[str]:
    """Returns the path of a key, in which `NAME` stands for any name."""
    return name.replace("[]", ".[]").replace("*", "NAME").split(".")


def set_in(values: dict[str, Any], path: list[str], value: Any) -> None:
    """Sets a nested value; `[]` is the only entry of a list."""
    name, *rest = path
    if not rest:
        values[name] = value
    elif rest[0] == "[]":
        entries = values.setdefault(name, [{}])
        set_in(entries[0], rest[1:], value)
    else:
        deeper = values.get(name) or {}
        values[name] = deeper
        set_in(deeper, rest, value)


@pytest.mark.parametrize("text", [MINIMAL, FULL], ids=["minimal", "full"])
def test_explained_yaml_is_the_same_configuration_with_a_comment_above_every_key(text: str) -> None:
    config = parse_config(text)
    explained = explain_yaml(config)
    assert parse_config(explained) == config

    lines = explained.splitlines()
    plain = [line for line in lines if not line.lstrip().startswith("# ")]
    assert yaml.safe_load("\n".join(plain)) == yaml.safe_load(dump_yaml(config))
    number = lines.index("  timeout_s: 300.0")
    assert lines[number - 1] == "  # number, in seconds; default 300.0"
    assert lines[number - 2].startswith("  # Seconds that a rank waits")


def test_command_explains_a_yaml_with_its_own_values(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(MINIMAL)
    done = CliRunner().invoke(app, ["config", "show", str(file), "train.num_steps=7", "--explain"])
    assert done.exit_code == 0, done.output
    assert "  # integer, in steps; default 1000\n  num_steps: 7\n" in done.output
    (tmp_path / "explained.yaml").write_text(done.output)
    assert load_config(tmp_path / "explained.yaml").train.num_steps == 7

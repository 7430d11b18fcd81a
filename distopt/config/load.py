"""From a YAML file and `key=value` overrides to a `RunConfig`, or to one error that names every mistake."""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from distopt.config.base import ConfigError
from distopt.config.kubernetes import (
    LABEL_KEY_PATTERN,
    LABEL_VALUE_PATTERN,
    NAME_PATTERN,
    QUANTITY_PATTERN,
    RESOURCE_PATTERN,
)
from distopt.config.plugins import REFERENCE_PATTERN
from distopt.config.schema import RUN_NAME_PATTERN, RunConfig
from distopt.config.slurm import MEMORY_PATTERN, TIME_PATTERN
from distopt.config.values import AS_TEXT, HOST_PATTERN, SECRET_NAME
from distopt.config.yaml_source import MAX_BYTES, UnsafeYAML, format_yaml, parse_yaml
from distopt.launchers import CHECKPOINTS, CONFIG_FILE

# `key=value`: the key is dotted, and everything behind the first `=` is YAML, which may hold further `=` and newlines.
_OVERRIDE = re.compile(r"^([A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z0-9_]+)*)=(.*)$", re.DOTALL)
_INTERPOLATION = re.compile(r"(\\*)\$\{")
_SECRET_REFERENCE = re.compile(r"(?<!\\)(?:\\\\)*\$\{\s*oc\.env\s*:\s*['\"]?([A-Za-z0-9_]+)")

# What is expected, by pydantic's type of error, where its own message does not say it to somebody who writes YAML.
_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "path_type": "a path",
    "finite_number": "a finite number",
    "invalid_key": "a string as a key",
}
_EXPECTED_PATTERNS = {
    RUN_NAME_PATTERN: "a letter or digit and at most 63 more letters, digits, dots, underscores and dashes",
    REFERENCE_PATTERN: "module:Name of your own code, such as mypackage.module:MyClass",
    HOST_PATTERN: "the name or the IPv4 address of a host; IPv6 is not used",
    TIME_PATTERN: "minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes or UNLIMITED",
    MEMORY_PATTERN: "a whole number of megabytes, or one with K, M, G or T, such as 16G",
    QUANTITY_PATTERN: "a number, and no unit or one of m, k, M, G, T, P, E, Ki, Mi, Gi, Ti, Pi, Ei",
    RESOURCE_PATTERN: "cpu, memory, ephemeral-storage, hugepages-<size> or a name with a domain: example.com/device",
    NAME_PATTERN: "a-z, 0-9, dashes and dots, first and last no dash and no dot",
    LABEL_KEY_PATTERN: "at most 63 letters, digits, dots, underscores and dashes, after an optional domain and `/`",
    LABEL_VALUE_PATTERN: "at most 63 letters, digits, dots, underscores and dashes, first and last a letter or digit",
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    r"""Reads a run's YAML, replaces keys by `overrides`, resolves `${...}` and checks the result.

    Args:
        path: The YAML file.
        overrides: `key=value` with dotted keys and YAML values, such as `train.num_steps=10` or `launch.hosts=[a,b]`.

    Returns:
        The checked configuration, with all defaults filled in.

    Raises:
        ConfigError: There are mistakes; the message names each of them with file, key and the nearest known key.

    Example:
        >>> from tempfile import NamedTemporaryFile
        >>> with NamedTemporaryFile("w", suffix=".yaml") as file:
        ...     _ = file.write("name: demo\nscript: train.py")
        ...     file.flush()
        ...     config = load_config(file.name, ["launch.workers=2"])
        >>> config.launch.workers, str(config.run_dir)
        (2, 'runs/demo')
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1).decode("utf-8")
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file{_files_nearby(path)}"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read: {error}"]) from error
    return parse_config(text, overrides, source=str(path))


def parse_config(text: str, overrides: Sequence[str] = (), *, source: str = "configuration") -> RunConfig:
    """Does what `load_config` does for YAML that is already in memory; `source` is the name of the file in errors."""
    try:
        raw = parse_yaml(text, _is_text)
    except (UnsafeYAML, yaml.YAMLError) as error:
        raise ConfigError([f"{source}: {_yaml_problem(error)}"]) from error
    if not isinstance(raw, dict):
        raise ConfigError([f"{source}: found {_shown(raw)}, expected a mapping that starts with `name:`"])
    resolved, overridden = _resolve(raw, overrides, source)
    try:
        return RunConfig.model_validate(resolved)
    except ValidationError as error:
        raise ConfigError(list(_problems(error, source, overridden))) from error


def checkpoints_of(run_dir: Path) -> Path | str:
    """Returns where a run that was started keeps its checkpoints, a folder or a URL, by the YAML in its directory.

    A run without one, or with one that this version does not read, keeps them inside.
    """
    try:
        recorded = load_config(run_dir / CONFIG_FILE)
    except ConfigError:
        return run_dir / CHECKPOINTS
    # Not `recorded.checkpoints()`: the directory may have been moved since.
    return run_dir / CHECKPOINTS if recorded.checkpoint.directory is None else recorded.checkpoints()


def dump_yaml(config: RunConfig) -> str:
    """Returns the configuration as YAML that `load_config` reads back to an equal one."""
    return format_yaml(plain_values(config))


def plain_values(config: RunConfig) -> dict[str, Any]:
    """Returns the configuration as plain dicts, lists and scalars that `format_yaml` writes for `load_config`."""
    values: dict[str, Any] = _writable(config.model_dump())
    return values


def _writable(value: Any) -> Any:
    """Returns plain values with `${` escaped, since what is written here is resolved already."""
    if isinstance(value, dict):
        return {key: _writable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_writable(item) for item in value]
    if isinstance(value, Path):
        value = f"./{value}" if value.parts and value.parts[0].startswith("~") else str(value)
    # OmegaConf takes `\${` for a literal `${`, and two backslashes before it for one.
    return _INTERPOLATION.sub(lambda match: match[1] * 2 + r"\${", value) if isinstance(value, str) else value


def _resolve(raw: dict[str, Any], overrides: Sequence[str], source: str) -> tuple[dict[str, Any], list[str]]:
    """Applies the overrides and OmegaConf's interpolation; returns plain data and the overridden keys."""
    if not overrides and not any("${" in value for value in _strings(raw)):
        return raw, []  # the usual case in a worker, where importing OmegaConf would only cost time
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    parsed = [_parse_override(text) for text in overrides]
    problems = [problem for _, _, problem in parsed if problem]
    if problems:
        raise ConfigError(problems)

    # The resolved configuration is written into the run directory and shown by `--dry-run`. A secret that is read from
    # the environment would end up there, so it is refused before it is resolved.
    for value in _strings([raw, [value for _, value, _ in parsed]]):
        for variable in _SECRET_REFERENCE.findall(value):
            if SECRET_NAME.search(variable):
                raise ConfigError(
                    [f"{source}: ${{oc.env:{variable}}} would write a secret into the run directory; "
                     f"name it in launch.secrets: [{variable}]"]
                )  # fmt: skip

    # `run_dir` gets its default before interpolation, so that other values may refer to it as `${run_dir}`.
    try:
        default = {"run_dir": "runs/${name}"} if "name" in raw else {}
        tree = OmegaConf.create({**default, **raw})
        for key, value, _ in parsed:
            OmegaConf.update(tree, key, value, merge=False)
        resolved = OmegaConf.to_container(tree, resolve=True)
    except (OmegaConfBaseException, TypeError, ValueError, IndexError) as error:
        key = str(getattr(error, "full_key", None) or "")
        reason = str(error).splitlines()[0]
        name = re.search(r"Interpolation key '(\w+)' not found", reason)
        if name is not None and name[1] in os.environ:
            reason += f"; for the environment variable write ${{oc.env:{name[1]}}}"
        raise ConfigError([f"{source}: {key and key + ': '}{reason}"]) from error
    assert isinstance(resolved, dict)
    return typing.cast("dict[str, Any]", resolved), [key for key, _, _ in parsed]


def _parse_override(text: str) -> tuple[str, Any, str | None]:
    # Under a locale of ASCII other letters arrive as bytes in disguise.
    if any("\udc80" <= letter <= "\udcff" for letter in text):
        text = os.fsencode(text).decode(errors="surrogateescape")
    match = _OVERRIDE.match(text)
    if match is None:
        return "", None, f"{_shortened(text)} on the command line: expected key=value, such as train.num_steps=10"
    try:
        keys = tuple(match[1].split("."))
        return match[1], parse_yaml(match[2], _is_text, keys) if match[2] else "", None
    except (UnsafeYAML, yaml.YAMLError) as error:
        return "", None, f"{_shortened(text)} on the command line: {_yaml_problem(error)}"


def _problems(error: ValidationError, source: str, overridden: Sequence[str]) -> Iterator[str]:
    for key, details in _by_key(error):
        given = any(key == name or name.startswith(key + ".") or key.startswith(name + ".") for name in overridden)
        yield f"{'command line' if given else source}: {key + ': ' if key else ''}{_describe(key, details)}"


def _by_key(error: ValidationError) -> Iterator[tuple[str, list[ErrorDetails]]]:
    """Collects the errors of all members of a union (`int | str`) under the one key that the user wrote.

    pydantic reports each member separately and appends the member's name to the location, as if it were a key.
    """
    collected: dict[str, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        keys: list[str] = []
        for item in detail["loc"]:
            if isinstance(item, str) and not _is_key(keys, item) and detail["type"] != "extra_forbidden":
                break  # the name of a member of the union
            keys.append(str(item))
        collected.setdefault(".".join(keys), []).append(detail)
    yield from collected.items()


def _describe(key: str, details: Sequence[ErrorDetails]) -> str:
    first = details[0]
    kind, value = first["type"], first["input"]
    if kind == "extra_forbidden":
        return _unknown(key)
    if kind == "missing":
        return "missing, and it has no default"

    # A validator of this project says more than the other members of a union can.
    for detail in details:
        if detail["type"] == "value_error":
            return detail["msg"].removeprefix("Value error, ")

    expected = " or ".join(dict.fromkeys(_expectation(detail) for detail in details))
    hint = ""
    if kind == "literal_error" and isinstance(value, str):
        names = re.findall(r"'([^']*)'", first["ctx"]["expected"])
        hint = "".join(f" Did you mean {near}?" for near in difflib.get_close_matches(value, names, 1, 0.5))
    elif kind == "string_type" and isinstance(value, bool | int | float):
        hint = " Put it in quotes."
    return f"found {_shown(value)}, expected {expected}.{hint}"


def _expectation(detail: ErrorDetails) -> str:
    kind = detail["type"]
    if kind == "literal_error":
        return "one of " + str(detail["ctx"]["expected"]).replace("'", "").replace(" or ", ", ")
    if kind == "string_pattern_mismatch":
        pattern = detail["ctx"]["pattern"]
        return _EXPECTED_PATTERNS.get(pattern, f"a string that matches {pattern}")
    text = detail["msg"].removeprefix("Input should be ").replace("String should have", "a string with")
    return _EXPECTED.get(kind) or (f"a number {text}" if kind.startswith(("greater_than", "less_than")) else text)


def _unknown(key: str) -> str:
    """Names the nearest known key: first of the same section, then one with the same name in another section."""
    # A key at the wrong level is the most common mistake, so a key of the same name anywhere is the second guess.
    parent, _, leaf = key.rpartition(".")
    known = sorted(_fields(parent.split(".") if parent else []))
    prefix = parent + "." if parent else ""
    near = [prefix + name for name in difflib.get_close_matches(leaf, known, 1, 0.6)]
    near = near or [path for path in _all_keys(RunConfig) if path.rpartition(".")[2] == leaf][:1]
    meant = f" Did you mean {near[0]}?" if near else ""
    return f"unknown key.{meant} Known: {', '.join(known)}."


def _section(annotation: Any) -> type[BaseModel] | None:
    """Returns the section that a field holds, which may be optional or in a list."""
    # `ClipConfig`, `SchedulerConfig | None`, `list[LoggerConfig]`: the first section inside is the one that keys below
    # the field belong to. No field holds two kinds of sections.
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (list, typing.Union, types.UnionType, typing.Annotated):
        return next(filter(None, map(_section, typing.get_args(annotation))), None)
    return None


def _fields(keys: Sequence[str]) -> dict[str, Any]:
    """Returns the fields of the section at `keys`, or none where there is no section."""
    model: type[BaseModel] | None = RunConfig
    for key in keys:
        if key.isdecimal():
            continue  # an index into a list of sections
        field = model.model_fields.get(key) if model else None
        model = _section(field.annotation) if field else None
    return dict(model.model_fields) if model else {}


def _is_key(keys: Sequence[str], name: str) -> bool:
    """Returns whether a user can write `name` below `keys`: it is a field, or inside a mapping without a schema."""
    if name in _fields(keys):
        return True
    field = _fields(keys[:-1]).get(keys[-1]) if keys else None
    return field is not None and _section(field.annotation) is None and "dict" in str(field.annotation)


def _is_text(keys: Sequence[str]) -> bool:
    """Returns whether the value at `keys` is a text that people may write without quotes, such as `1.10`."""
    # `script_args.0` and `launch.env.NAME` are elements of a field.
    field = _fields(keys[:-1]).get(keys[-1]) or _fields(keys[:-2]).get(keys[-2] if len(keys) > 1 else "")
    return field is not None and (AS_TEXT in field.metadata or _holds_text(field.annotation))


def _holds_text(annotation: Any) -> bool:
    """Returns whether a type is `Text`, or one of those inside of it is."""
    return AS_TEXT in getattr(annotation, "__metadata__", ()) or any(map(_holds_text, typing.get_args(annotation)))


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        section = _section(field.annotation)
        if section is not None:
            yield from _all_keys(section, f"{prefix}{name}.")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _shown(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    return f"{_shortened(value)} ({type(value).__name__})"


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _yaml_problem(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return str(error).splitlines()[0]


def _files_nearby(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; {path.parent} does not exist either; the current directory is {Path.cwd()}"
    names = sorted(file.name for file in path.parent.iterdir() if file.suffix in (".yaml", ".yml"))
    near = difflib.get_close_matches(path.name, names, 1, 0.5)
    if near:
        return f". Did you mean {path.parent / near[0]}?"
    return f". Known in {path.parent}: {', '.join(names)}." if names else ""

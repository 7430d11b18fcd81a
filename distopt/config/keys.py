"""Every key of the YAML with type, default, unit and meaning: for `distopt config show --explain` and the reference."""

from __future__ import annotations

import json
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from distopt.config.base import Section
from distopt.config.load import plain_values
from distopt.config.plugins import REFERENCE_PATTERN
from distopt.config.schema import RunConfig
from distopt.config.yaml_source import format_yaml

COMMENT_WIDTH = 100
_PLAIN = re.compile(r"^[A-Za-z_][\w./:=-]*(?<!:)$")  # strings that need no quotes within flow style, if no other type

# A unit stands at the end of a key's name, or the key counts something that its first word says.
_UNITS = {
    "_s": "seconds",
    "_mib": "MiB",
    "_steps": "steps",
    "steps": "steps",
    "_in_row": "steps",
    "global_batch": "rows per step",
    "prefetch": "batches",
    "num_particles": "samples",
    "backward_passes_per_step": "calls per step",
    "patience": "validations",
    "keep_last": "checkpoints",
    "workers": "processes per host",
    "cpus_per_worker": "cores",
    "gpus_per_node": "GPUs",
    "gpus": "GPUs",
    "nodes": "hosts",
    "min_hosts": "hosts",
    "max_restarts": "restarts",
    "max_preemptions": "preemptions",
}

# Values of keys whose type and default show none. Each is one that a YAML may have; a test loads them all.
_EXAMPLES: dict[str, Any] = {
    "name": "flights",
    "run_dir": "/scratch/runs/flights",
    "task": "mytasks:Sales",
    "task_args": {"path": "sales.parquet"},
    "script": "train.py",
    "script_args": ["--epochs", "3"],
    "train.loss_args": {"max_plate_nesting": 1},
    "train.validate_every_steps": 100,
    "train.early_stopping": {"metric": "rmse"},
    "train.early_stopping.metric": "rmse",
    "train.compile_from_step": 1000,
    "data.global_batch": 8192,
    "data.shard_fraction": 0.1,
    "optim.args_by_name": {"*.bias": {"weight_decay": 0.0}},
    "optim.clip.clip_norm": 10.0,
    "optim.clip.clip_value": 1.0,
    "optim.clip.global_norm": 10.0,
    "optim.scheduler": {"name": "ExponentialLR", "args": {"gamma": 0.998}},
    "optim.scheduler.name": "ExponentialLR",
    "optim.scheduler.args": {"gamma": 0.998},
    "reduce.groups": [["AutoNormal.locs.a", "AutoNormal.scales.a"]],
    "reduce.drift_every_steps": 100,
    "checkpoint.directory": "s3://bucket/flights",
    "checkpoint.keep_every_steps": 10000,
    "checkpoint.keep_best": {"metric": "rmse"},
    "checkpoint.keep_best.metric": "rmse",
    "checkpoint.resume": "runs/other",
    "checkpoint.resume_only": ["params"],
    "log.loggers": ["my_logger:CsvLogger"],
    "log.loggers[].name": "my_logger:CsvLogger",
    "log.loggers[].args": {"file_name": "elbo.csv"},
    "serve.port": 8000,
    "serve.host": "0.0.0.0",
    "launch.workers": 4,
    "launch.hosts": ["node1", "node2"],
    "launch.hostfile": "hosts.txt",
    "launch.nodes": 2,
    "launch.min_hosts": 1,
    "launch.interface": "eth0",
    "launch.port": 29400,
    "launch.env": {"OMP_NUM_THREADS": "4"},
    "launch.secrets": ["AWS_SECRET_ACCESS_KEY"],
    "launch.ssh.config": "~/.ssh/cluster",
    "launch.ssh.known_hosts": "~/.ssh/cluster_hosts",
    "launch.slurm.partition": "compute",
    "launch.slurm.account": "project1",
    "launch.slurm.qos": "normal",
    "launch.slurm.time": "12:00:00",
    "launch.slurm.memory": "16G",
    "launch.max_preemptions": 10,
    "launch.preemption_file": "/var/run/preempted",
    "launch.slurm.gres": "gpu:a100:4",
    "launch.slurm.constraint": "ib",
    "launch.slurm.nodelist": "gpu[01-04]",
    "launch.slurm.exclude": "gpu03",
    "launch.slurm.reservation": "course",
    "launch.slurm.licenses": "data:1",
    "launch.slurm.mail_type": ["END", "FAIL"],
    "launch.slurm.mail_user": "me@example.org",
    "launch.slurm.extra_args": ["--comment=flights"],
    "launch.slurm.srun_args": ["--cpu-bind=cores"],
    "launch.slurm.setup": ["module load cuda"],
    "launch.slurm.container": {"runtime": "apptainer", "image": "distopt.sif"},
    "launch.slurm.container.runtime": "apptainer",
    "launch.slurm.container.image": "distopt.sif",
    "launch.slurm.container.mounts": ["/data:/inside:ro"],
    "launch.slurm.container.extra_args": ["--rocm"],
    "launch.kubernetes.image": "registry.example.org/me/distopt:1",
    "launch.kubernetes.context": "staging",
    "launch.kubernetes.volumes": [{"claim": "runs", "path": "/runs"}],
    "launch.kubernetes.volumes[].claim": "runs",
    "launch.kubernetes.volumes[].path": "/runs",
    "launch.kubernetes.volumes[].config_map": "settings",
    "launch.kubernetes.volumes[].empty_dir": "10Gi",
    "launch.kubernetes.volumes[].ephemeral": "10Gi",
    "launch.kubernetes.volumes[].storage_class": "fast",
    "launch.kubernetes.volumes[].host_path": "/data",
    "launch.kubernetes.volumes[].sub_path": "flights",
    "launch.kubernetes.resources": {"ephemeral-storage": "20Gi"},
    "launch.kubernetes.requests": {"cpu": "500m"},
    "launch.kubernetes.limits": {"cpu": None},
    "launch.kubernetes.tolerations": [{"key": "gpu", "operator": "Exists"}],
    "launch.kubernetes.priority_class": "research",
    "launch.kubernetes.labels": {"team": "cells"},
    "launch.kubernetes.annotations": {"example.org/owner": "me"},
    "launch.kubernetes.ttl_s": 86400,
    "launch.kubernetes.secrets": {"AWS_SECRET_ACCESS_KEY": {"secret": "s3", "key": "secret-key"}},
    "launch.kubernetes.secrets.*.secret": "s3",
    "launch.kubernetes.secrets.*.key": "secret-key",
    "launch.kubernetes.service_account": "trainer",
    "launch.kubernetes.node_selector": {"pool": "compute"},
    "launch.kubernetes.queue": "research",
    "launch.kubernetes.time_limit_s": 86400,
    "launch.kubernetes.image_pull_secrets": ["registry"],
}


@dataclass(frozen=True)
class Key:
    """A key of the YAML.

    Attributes:
        name: Dotted; `[]` stands for each entry of a list, `*` for each name in a mapping.
        type: What it takes, in words of YAML.
        default: Its value where the YAML does not say it, as YAML; None if it must be given, empty for a section.
        unit: Of a number; empty where it has none.
        text: What it means.
        example: A value as YAML.
        is_section: Whether it holds the keys that come after it.
    """

    name: str
    type: str
    default: str | None
    unit: str
    text: str
    example: str
    is_section: bool = False


def all_keys() -> list[Key]:
    """Returns every key of the YAML, sections before what they hold.

    Example:
        >>> [key] = [key for key in all_keys() if key.name == "reduce.timeout_s"]
        >>> key.type, key.default, key.unit
        ('number', '300.0', 'seconds')
    """
    return list(_keys_of(RunConfig, ""))


def _keys_of(section: type[Section], prefix: str) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        inner, suffix = _section_of(field.annotation)
        full_name = f"{prefix}{name}"
        text = " ".join((field.description or "").split())
        yield Key(
            name=full_name,
            type=_type_of(field),
            default=_default_of(full_name, field),
            unit=_unit_of(name),
            text=text,
            example=_example_of(full_name, field),
            is_section=inner is not None and not suffix,
        )
        if inner is not None:
            yield from _keys_of(inner, f"{full_name}{suffix}.")


def _section_of(annotation: Any) -> tuple[type[Section] | None, str]:
    """Returns the section that a key holds, or None, and how its entries are named."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation, ""
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    suffix = "[]" if origin is list else ".*" if origin is dict else ""
    if origin is Literal:
        return None, ""
    for argument in arguments:
        inner, deeper = _section_of(argument)
        if inner is not None:
            return inner, suffix or deeper
    return None, ""


def _unit_of(name: str) -> str:
    return next((unit for ending, unit in _UNITS.items() if name == ending or name.endswith(ending)), "")


def _default_of(name: str, field: FieldInfo) -> str | None:
    if name == "run_dir":
        return "runs/<name>"
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is PydanticUndefined:
        return None
    if isinstance(default, Section):
        return ""
    return as_yaml(default)


def as_yaml(value: Any) -> str:
    """Returns a value in YAML's flow style, on one line."""
    if isinstance(value, str):
        return value if _PLAIN.match(value) and yaml.safe_load(value) == value else json.dumps(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{as_yaml(key)}: {as_yaml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(as_yaml, value)) + "]"
    return json.dumps(value)


_NAMES = {bool: "true or false", int: "integer", float: "number", str: "string", type(None): "null", dict: "mapping"}


def _type_of(field: FieldInfo) -> str:
    return " or ".join(dict.fromkeys(_types_in(field.annotation, list(field.metadata))))


def _types_in(annotation: Any, metadata: list[Any]) -> Iterator[str]:
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is typing.Annotated:
        yield from _types_in(arguments[0], list(arguments[1:]))
    elif origin in (typing.Union, types.UnionType):
        for argument in arguments:
            yield from _types_in(argument, [])
    elif origin is Literal:
        yield from (f"`{as_yaml(each)}`" for each in arguments)
    elif origin in (list, tuple, dict):
        yield {list: "list", tuple: "list", dict: "mapping"}[origin]
    elif isinstance(annotation, type) and issubclass(annotation, Section):
        yield "mapping"
    elif annotation is str and any(_pattern_of(each) == REFERENCE_PATTERN for each in metadata):
        yield "`module:Name`"
    else:
        yield _NAMES.get(annotation, "path" if "Path" in str(annotation) else "any value")


def _pattern_of(metadata: Any) -> str | None:
    """Returns the pattern of a string, which pydantic keeps in one of several kinds of metadata."""
    pattern = getattr(metadata, "pattern", None)
    nested = (_pattern_of(each) for each in getattr(metadata, "metadata", ()))
    return pattern or next(filter(None, nested), None)


def _example_of(name: str, field: FieldInfo) -> str:
    """Returns a value that is not the default where the type says one, or that of `_EXAMPLES`, or the default."""
    if name in _EXAMPLES:
        return as_yaml(_EXAMPLES[name])
    default = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(default, bool):
        return as_yaml(not default)
    choices = [choice for choice in _choices(field.annotation) if choice != default]
    if choices:
        return as_yaml(choices[0])
    return "" if default is PydanticUndefined or default is None or isinstance(default, Section) else as_yaml(default)


def _choices(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) is Literal:
        yield from typing.get_args(annotation)
    else:
        for argument in typing.get_args(annotation):
            yield from _choices(argument)


def explain_yaml(config: RunConfig) -> str:
    """Returns a configuration as YAML in which a comment above each key has its meaning, type, default and unit."""
    return "\n".join(_explained(config, plain_values(config), "")) + "\n"


def _explained(section: Section, values: dict[str, Any], prefix: str) -> Iterator[str]:
    indent = "  " * prefix.count(".")
    for key in _keys_of(type(section), prefix):
        name = key.name.removeprefix(prefix)
        if name not in values:
            continue  # within a section below
        yield from _comment_of(key, indent)
        inner = getattr(section, name)
        if isinstance(inner, Section):
            yield f"{indent}{name}:"
            yield from _explained(inner, values[name], f"{key.name}.")
        else:
            yield textwrap.indent(format_yaml({name: values[name]}).rstrip("\n"), indent)


def _comment_of(key: Key, indent: str) -> Iterator[str]:
    yield from _wrapped(key.text, indent)
    if key.default != "":
        kind = key.type.replace("`", "") + (f", in {key.unit}" if key.unit else "")
        yield from _wrapped(f"{kind}; {'required' if key.default is None else f'default {key.default}'}", indent)


def _wrapped(text: str, indent: str) -> list[str]:
    prefix = f"{indent}# "
    return textwrap.wrap(
        text,
        COMMENT_WIDTH,
        initial_indent=prefix,
        subsequent_indent=prefix,
        break_long_words=False,
        break_on_hyphens=False,
    )

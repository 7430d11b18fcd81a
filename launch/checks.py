"""Everything wrong with a run that can be seen before any process starts; nothing here imports torch or the task."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

import yaml

from distopt.cgroups import available_cores
from distopt.config import MAY_CHANGE, ConfigError, RunConfig, comparable, differences, load_config
from distopt.config.plugins import is_reference
from distopt.launchers import CONFIG_FILE, MAX_PORT, RENDEZVOUS_PORT
from distopt.run_files import checkpoints_in

from .findings import Finding, failures
from .platforms import Platform, findings_of
from .ssh import check_cores
from .worker.network import bind_error, is_here


def check(config: RunConfig, platform: Platform, *, dry_run: bool = False) -> list[Finding]:
    """Returns all that is wrong with a run on its platform; it is not started where one of them is a failure.

    Args:
        config: The run.
        platform: Its platform.
        dry_run: Whether the run is only shown. What this machine lacks is then a warning, and no other one is asked.
    """
    of_machine = [
        *findings_of(platform.check_machine, config),
        *_check_local_cores(config, platform),
        *_check_secrets(config, platform),
        *_check_port(config, platform),
        *_check_writable(platform.record_dir(config)),
    ]
    findings = [
        *findings_of(platform.check, config),
        *([replace(finding, severity="warning") for finding in of_machine] if dry_run else of_machine),
        *_check_code(config, platform.image(config)),
        *_check_loggers(config, platform.image(config)),
        *_check_nodes(config, platform),
        *_check_serve(config, platform),
        *_check_global_batch(config),
        *_check_recorded_config(config),
    ]
    if not dry_run and not failures(findings):
        findings += findings_of(platform.check_hosts, config)
    return findings


# Code that the configuration names. It is read and parsed, never imported: a task imports torch, which takes seconds,
# and importing a module runs whatever stands at its top level.


def _check_code(config: RunConfig, image: str | None) -> Iterator[Finding]:
    """Yields what is wrong with the script and with each `module:Name`; what is not here may still be in an image."""
    if config.script is not None:
        path = Path(config.script)
        if path.is_file():
            yield from _check_syntax(path, "script")
        else:
            yield _or_in_image(Finding("script", f"{path}: no such file in {Path.cwd()}"), image)

    for key, reference in config.references():
        spec = _find_module(key, reference.partition(":")[0])
        if isinstance(spec, Finding):
            yield _or_in_image(spec, image)
        else:
            yield from _check_name(key, reference, spec)


def _check_loggers(config: RunConfig, image: str | None) -> Iterator[Finding]:
    """Yields the loggers whose package is not installed; each is named as its package and as its extra."""
    for index, logger in enumerate(config.log.loggers):
        if not is_reference(logger.name) and not _is_installed(logger.name):
            missing = f"{logger.name} is not installed for {sys.executable}"
            fix = f"pip install 'distopt[{logger.name}]'"
            yield _or_in_image(Finding(f"log.loggers.{index}", missing, fix), image)


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a folder `wandb` of logs could be imported, too


def _or_in_image(missing: Finding, image: str | None) -> Finding:
    """Returns what is missing here as a warning if workers run in an image, which cannot be looked into."""
    return missing if image is None else replace(missing, fix=f"it must be in {image}", severity="warning")


def _find_module(key: str, module: str) -> ModuleSpec | Finding:
    """Returns where a module is, without importing its parents, or that there is none."""
    first, *rest = module.split(".")
    sys.path.insert(0, os.getcwd())  # where `python -m` starts its search in each worker
    try:
        spec = importlib.util.find_spec(first)
    except (ImportError, ValueError):
        spec = None
    finally:
        sys.path.pop(0)

    # `find_spec("a.b")` would import `a`, so each level is looked up in the folders of the one above.
    path = first
    for name in rest:
        if spec is None:
            break
        if spec.submodule_search_locations is None:
            return Finding(key, f"{module}: {path} is a module and not a package, so it has no submodule {name}")
        path += f".{name}"
        spec = PathFinder.find_spec(path, list(spec.submodule_search_locations))

    if spec is None:
        return Finding(
            key,
            f"no module {path!r} for {sys.executable} in {Path.cwd()}",
            "check the spelling, that it is installed here, or run the command from the folder that contains it",
        )
    return spec


def _check_name(key: str, reference: str, spec: ModuleSpec) -> Iterator[Finding]:
    """Yields that the module of `module:Name` has a syntax error or no such name."""
    module, _, name = reference.partition(":")
    path = Path(spec.origin or "")
    if path.suffix != ".py":
        return  # compiled: only importing it can tell

    syntax_errors = list(_check_syntax(path, key))
    if syntax_errors:
        yield from syntax_errors
        return
    names = _names_bound(ast.parse(path.read_bytes()))
    if names is not None and name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {module}:{near[0]}?" if near else f"it has: {', '.join(sorted(names)[:20])}"
        yield Finding(key, f"{path} has no {name!r}", hint)


def _check_syntax(path: Path, key: str) -> Iterator[Finding]:
    try:
        ast.parse(path.read_bytes(), str(path))
    except SyntaxError as error:
        yield Finding(key, f"{path}:{error.lineno}: {error.msg}")
    except (OSError, ValueError) as error:  # not readable, or null bytes
        yield Finding(key, f"{path}: {error}")


def _names_bound(tree: ast.Module) -> set[str] | None:
    """Returns the names that a module binds; None where only running it can tell."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return None if {"*", "__getattr__"} & names else names


# Hosts, processes and ports.


def _check_nodes(config: RunConfig, platform: Platform) -> Iterator[Finding]:
    launch = config.launch
    if launch.nodes not in (None, 1) and not platform.finds_hosts and not launch.hosts:
        yield Finding(
            "launch.nodes",
            f"found {launch.nodes}, but {launch.platform} does not find hosts by itself",
            "name them in launch.hosts, or set launch.platform to slurm or kubernetes",
        )


def _check_local_cores(config: RunConfig, platform: Platform) -> Iterator[Finding]:
    """Yields that this machine has too few cores; platforms ask other hosts, and clusters know their own."""
    hosts = config.launch.hosts
    runs_here = not platform.finds_hosts and (not hosts or any(map(is_here, hosts)))
    if runs_here:
        yield from check_cores(config, "this machine", available_cores())


def _check_secrets(config: RunConfig, platform: Platform) -> Iterator[Finding]:
    if platform.image(config) is not None:
        return  # its workers inherit nothing from here
    for name in config.launch.secrets:
        if name not in os.environ:
            yield Finding(
                "launch.secrets", f"{name} is not set in your environment, from which workers inherit it", "export it"
            )


def _check_global_batch(config: RunConfig) -> Iterator[Finding]:
    """Refuses shares of unequal size unless they are needed: an elastic run, whose world changes, weights them."""
    batch = config.data.global_batch
    sizes = config.launch.world_sizes
    workers = sizes[-1]
    if batch is None or config.script is not None:
        return

    if batch < workers:
        yield Finding(
            "data.global_batch",
            f"{batch} rows cannot be shared by {workers} workers, each needs at least one",
            f"set data.global_batch={workers}, or use fewer workers",
        )
    elif len(sizes) == 1 and batch % workers:
        below = batch - batch % workers
        yield Finding(
            "data.global_batch",
            f"{batch} rows cannot be divided evenly among {workers} workers",
            f"set data.global_batch={below} or {below + workers}, or use another number of workers",
        )


def _check_port(config: RunConfig, platform: Platform) -> Iterator[Finding]:
    port = config.launch.port
    if port is None or config.launch.hosts or platform.finds_hosts:
        return
    if error := bind_error("127.0.0.1", port):
        yield Finding(
            "launch.port",
            f"{port} cannot be used on this machine: {error}",
            f"`ss -ltnp sport = :{port}` shows what uses it, launch.port=null takes a free one",
        )


def _check_serve(config: RunConfig, platform: Platform) -> Iterator[Finding]:
    """Yields that a rank would serve at a port that does not exist, or at that of the rendezvous."""
    first = config.serve.port
    if first is None:
        return
    workers = config.launch.workers
    highest = MAX_PORT + 1 - workers
    if first > highest:
        message = f"found {first}, but the last of {workers} workers would serve at {first + workers - 1}"
        yield Finding("serve.port", message, f"set serve.port={highest} or a lower one")

    needs_port = platform.finds_hosts or bool(config.launch.hosts)
    port = config.launch.port or (RENDEZVOUS_PORT if needs_port else None)
    if port is not None and first <= port < first + workers:
        message = f"workers serve at {first} to {first + workers - 1}, and launch.port is {port}"
        yield Finding("serve.port", message, f"choose a serve.port that leaves {port} free")


# The run directory.


def _check_writable(directory: Path) -> Iterator[Finding]:
    """Yields that the folder cannot be made or written to, judged by the nearest of its parents that is there."""
    parent = next(path for path in (directory, *directory.parents) if path.exists())
    if not parent.is_dir():
        yield Finding("run_dir", f"{parent} is a file", "choose another run_dir")
    elif not os.access(parent, os.W_OK | os.X_OK):
        yield Finding("run_dir", f"{parent} cannot be written to", "choose another run_dir, or change its permissions")


def _read_recorded(path: Path) -> Any:
    """Returns the configuration in a run directory as JSON values; one of another version as it stands there."""
    try:
        return load_config(path).as_json()
    except ConfigError:
        return yaml.safe_load(path.read_text(encoding="utf-8"))


def _check_recorded_config(config: RunConfig) -> Iterator[Finding]:
    """Refuses to resume from the checkpoints of another configuration, whose parameters would be loaded silently."""
    if config.checkpoint.resume == "never" or config.checkpoint.resume_only is not None:
        return  # then the difference is intended, and the workers take what these say
    recorded = config.run_dir / CONFIG_FILE
    folder = config.checkpoints()
    if not recorded.is_file() or isinstance(folder, str) or not checkpoints_in(folder):
        return  # checkpoints at a URL hold their configuration too, which the workers compare
    try:
        before = _read_recorded(recorded)
    except (OSError, ValueError, yaml.YAMLError) as error:
        yield Finding("run_dir", f"{recorded} cannot be read ({error})", "choose another run_dir")
        return

    changes = [
        f"\n    {key}: {old!r} there, {new!r} now"
        for key, old, new in differences(comparable(before), comparable(config.as_json()), MAY_CHANGE)
    ]
    if changes:
        yield Finding(
            "run_dir",
            f"{config.run_dir} holds checkpoints of another configuration:{''.join(changes)}",
            f"to start from the beginning, choose another run_dir (run_dir={config.run_dir}-2) or move this one away; "
            "to resume, undo the changes, or take the parameters alone by checkpoint.resume_only=[params]",
        )

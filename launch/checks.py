"""Everything wrong with a run that can be seen before any process starts; nothing here imports torch or the task."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import os
import socket
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

import yaml

from distopt.config import MAY_CHANGE, RunConfig, differences
from distopt.launchers import CHECKPOINTS, CONFIG_FILE

from .platforms.base import Platform
from .ssh import slot_problems
from .worker.network import is_here


def problems(config: RunConfig, platform: Platform) -> list[str]:
    """Returns every reason not to start, each with what was found, expected, and the mend."""
    return [
        *platform.problems(config),
        *(problem for problem, here in _code(config) if here or not platform.image(config)),
        *_nodes(config, platform),
        *_slots(config, platform),
        *_secrets(config, platform),
        *_global_batch(config),
        *_port(config, platform),
        *_run_directory(config, platform.record_dir(config)),
    ]


def warnings(config: RunConfig, platform: Platform) -> list[str]:
    """Returns what may be wrong and cannot be told here: code that is not on this machine may be in a pod's image."""
    image = platform.image(config)
    return [f"{said}; it must be in {image}" for said, here in _code(config) if not here and image]


def _code(config: RunConfig) -> Iterator[tuple[str, bool]]:
    """Yields what is wrong with the run's code, and whether the code was found here."""
    if config.script is not None:
        path = Path(config.script)
        if not path.is_file():
            yield f"script: {path}: no such file in {Path.cwd()}", False
        else:
            yield from ((said, True) for said in _syntax(path, "script"))
    if config.task is not None:
        found = not isinstance(_find_module(config.task.partition(":")[0]), str)
        yield from ((said, found) for said in task_problems(config.task))


def task_problems(task: str) -> Iterator[str]:
    """Finds out whether `module:Name` is there by reading the file, since importing it could take seconds.

    Example:
        >>> list(task_problems("distopt.config.schema:RunConfg"))  # doctest: +ELLIPSIS
        ["task: distopt.config.schema has no 'RunConfg'. Did you mean distopt.config.schema:RunConfig? (.../schema.py)"]
    """
    module, _, name = task.partition(":")
    spec = _find_module(module)
    if isinstance(spec, str):
        yield f"task: {spec}"
        return
    origin = Path(spec.origin or "")
    if origin.suffix != ".py":
        return  # compiled: only the import can tell
    found = list(_syntax(origin, "task"))
    yield from found
    names = None if found else _names(ast.parse(origin.read_bytes()))
    if names is not None and name not in names:
        near = difflib.get_close_matches(name, names, 1)
        meant = f"Did you mean {module}:{near[0]}?" if near else f"It has: {', '.join(sorted(names)[:20])}."
        yield f"task: {module} has no {name!r}. {meant} ({origin})"


def _find_module(module: str) -> ModuleSpec | str:
    """Returns where a module is, without running its parents, or what is wrong."""
    first, *rest = module.split(".")
    sys.path.insert(0, os.getcwd())  # where `python -m` starts its search in each worker
    try:
        spec = importlib.util.find_spec(first)
    except (ImportError, ValueError):
        spec = None
    finally:
        sys.path.pop(0)
    so_far = first
    for part in rest:
        if spec is None:
            break
        if spec.submodule_search_locations is None:
            return f"{module}: {so_far} is a module and no package, so it holds no {part}"
        so_far += f".{part}"
        spec = PathFinder.find_spec(so_far, list(spec.submodule_search_locations))
    if spec is None:
        return (
            f"no module {so_far!r} for {sys.executable} in {Path.cwd()}; "
            "is it spelt right, installed here, or below the folder where the command is given?"
        )
    return spec


def _syntax(path: Path, key: str) -> Iterator[str]:
    try:
        ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError) as error:
        where = f"{path}:{error.lineno}" if isinstance(error, SyntaxError) else str(path)
        yield f"{key}: {where}: {error.msg if isinstance(error, SyntaxError) else error}"


def _names(tree: ast.Module) -> set[str] | None:
    """Returns the names that a module binds; None where that cannot be told without running it."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return None if {"*", "__getattr__"} & names else names


def _global_batch(config: RunConfig) -> Iterator[str]:
    """Refuses parts that are unequal without need; an elastic run, whose world changes, has them weighted."""
    batch, sizes = config.data.global_batch, config.launch.world_sizes
    if batch is None or config.script is not None:
        return
    workers = sizes[-1]
    if batch < workers:
        yield (
            f"data.global_batch: {batch} rows cannot be shared by {workers} workers, each needs at least one; "
            f"take data.global_batch={workers}, or fewer workers"
        )
    elif len(sizes) == 1 and batch % workers:
        below = batch - batch % workers
        yield (
            f"data.global_batch: {batch} rows cannot be divided evenly among {workers} workers; "
            f"take data.global_batch={below} or {below + workers}, or another number of workers"
        )


def _nodes(config: RunConfig, platform: Platform) -> Iterator[str]:
    launch = config.launch
    if not platform.finds_hosts and launch.nodes not in (None, 1) and not launch.hosts:
        yield (
            f"launch.nodes: found {launch.nodes}, but {launch.platform} finds no hosts by itself; name them in "
            "launch.hosts, or take launch.platform=slurm or kubernetes"
        )


def _secrets(config: RunConfig, platform: Platform) -> Iterator[str]:
    for name in config.launch.secrets if not platform.image(config) else ():
        if name not in os.environ:
            yield f"launch.secrets: {name} is not set in your environment, from which workers get it; export it"


def _slots(config: RunConfig, platform: Platform) -> Iterator[str]:
    """Refuses more processes than there is room for; other hosts are asked over ssh, a Slurm cluster by itself."""
    launch = config.launch
    if not platform.finds_hosts and not (launch.hosts and not any(map(is_here, launch.hosts))):
        yield from slot_problems(config, "this machine", len(os.sched_getaffinity(0)))


def _port(config: RunConfig, platform: Platform) -> Iterator[str]:
    port = config.launch.port
    if port is None or config.launch.hosts or platform.finds_hosts:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            yield (
                f"launch.port: {port} cannot be used on this machine: {error.strerror}; "
                f"`ss -ltnp sport = :{port}` shows by whom it is in use, launch.port=null takes a free one"
            )


def _run_directory(config: RunConfig, here: Path) -> Iterator[str]:
    """Refuses to go on from the checkpoints of another configuration, whose parameters would silently be taken over."""
    recorded = config.run_dir / CONFIG_FILE
    for parent in (here, *here.parents):
        if parent.exists():
            if not parent.is_dir():
                yield f"run_dir: {parent} is a file; choose another run_dir"
            elif not os.access(parent, os.W_OK | os.X_OK):
                yield f"run_dir: {parent} cannot be written to; choose another run_dir, or change its permissions"
            break
    if not recorded.is_file() or not any((config.run_dir / CHECKPOINTS).glob("step-*")):
        return
    try:
        before = yaml.safe_load(recorded.read_text())
    except (OSError, yaml.YAMLError) as error:
        yield f"run_dir: {recorded} cannot be read ({error}); choose another run_dir"
        return
    changes = [
        f"{key}: {old!r} there, {new!r} now"
        for key, old, new in differences(before, config.model_dump(mode="json"), MAY_CHANGE)
    ]
    if changes:
        yield (
            f"run_dir: {config.run_dir} holds checkpoints of another configuration:\n    "
            + "\n    ".join(changes)
            + f"\n  To start anew, choose another run_dir (run_dir={config.run_dir}-2) or move this one away; "
            "to go on with it, take back the changes."
        )

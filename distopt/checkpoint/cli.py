"""`distopt checkpoint …`: show and verify checkpoints, and convert them from and to Pyro's own files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml

from distopt.checkpoint import reader
from distopt.checkpoint.errors import CheckpointError
from distopt.checkpoint.manifest import Manifest
from distopt.checkpoint.restore import REPLICATED, choose, load_replicated
from distopt.checkpoint.statefile import StateReader
from distopt.checkpoint.storage.base import Storage, open_storage
from distopt.config import differences
from distopt.config.paths import is_url
from distopt.launchers import RUNS
from distopt.optim.state import optimizer_state

app: typer.Typer = typer.Typer(
    help="Show, verify, export and import checkpoints.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
CheckpointPath = Annotated[
    str,
    typer.Argument(
        metavar="PATH", help="A checkpoint, a run (its folder or its name), its checkpoints, or a URL of them."
    ),
]


@app.command()
def inspect(
    path: CheckpointPath,
    tensors: Annotated[
        bool,
        typer.Option("--tensors", help="List parameters with constraint and optimizer state, and tensors."),
    ] = False,
) -> None:
    """Print what is in each checkpoint, newest first.

    The configuration of the oldest is printed as YAML, that of each later one as what differs from the one before.
    With --tensors the newest one's parameters are read.
    """

    def run() -> None:
        for line in describe(path, tensors=tensors):
            typer.echo(line)

    _run(run)


@app.command()
def verify(path: CheckpointPath) -> None:
    """Check that checkpoints are whole.

    Reads every byte and compares it with the checksums. The exit status is 1 if a checkpoint is damaged.
    """
    num_damaged = 0

    def run() -> None:
        nonlocal num_damaged
        for line, whole in check(path):
            typer.echo(line)
            num_damaged += not whole

    _run(run)
    if num_damaged:
        raise typer.Exit(1)


@app.command("export")
def export_(
    path: CheckpointPath,
    to: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write; it must not exist.")],
    what: Annotated[
        Literal["params", "optimizer", "module"],
        typer.Option(
            help="For pyro.get_param_store().load, for the load() of a pyro.optim optimizer, or for torch.load."
        ),
    ] = "params",
    name: Annotated[
        str | None, typer.Option(help="Which module's state_dict (guide by default), or which of several optimizers.")
    ] = None,
) -> None:
    """Write a file of Pyro or torch from a checkpoint.

    It holds the parameters, an optimizer's state or a module's state_dict of the newest checkpoint.
    """
    from distopt.checkpoint.pyro_files import export_module, export_optimizer, export_params

    def run() -> None:
        if to.exists():
            raise CheckpointError(f"{to} exists; remove it, or name another file.")
        if not to.parent.is_dir():
            raise CheckpointError(f"{to}: there is no folder {to.parent}; make it, or name another.")

        source = located(path)
        if what == "module":
            typer.echo(f"{to}: {export_module(source, to, name or 'guide')} tensors")
        elif what == "optimizer":
            typer.echo(f"{to}: {export_optimizer(source, to, name)} parameters")
        else:
            typer.echo(f"{to}: {export_params(source, to)} parameters")

    _run(run)


@app.command("import")
def import_(
    params: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="Written by pyro.get_param_store().save.")
    ] = None,
    *,
    to: Annotated[str, typer.Option(help="The directory of the run's checkpoints.")],
    optimizer: Annotated[Path | None, typer.Option(help="Written by the save() of a pyro.optim optimizer.")] = None,
    module: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FILE", help="A state_dict: guide=guide.pt; may be repeated.")
    ] = None,
    step: Annotated[int, typer.Option(help="The step from which the run continues to count.")] = 0,
) -> None:
    """Make a checkpoint from files of Pyro or torch.

    The files are Pyro's parameters and optimizers, and state_dicts of modules; no code in them is run.
    """
    from distopt.checkpoint.pyro_files import import_pyro

    def run() -> None:
        named = [each.partition("=") for each in module or ()]
        for name, _, file in named:
            if not name or not file:
                raise CheckpointError(f"--module {name}: write NAME=FILE, such as --module guide=guide.pt.")
        modules = {name: file for name, _, file in named}
        typer.echo(import_pyro(to, params, optimizer, modules=modules, step=step))

    _run(run)


def _run(command: Callable[[], None]) -> None:
    """Calls `command`; an error becomes one line and exit status 1."""
    try:
        command()
    except (CheckpointError, OSError) as error:
        typer.echo(f"distopt checkpoint: {error}", err=True)
        raise typer.Exit(1) from error


def located(path: str) -> str:
    """Returns the folder of a run that is named as `distopt status` names it, and any other path as it is."""
    run = Path(RUNS, path)
    return path if is_url(path) or Path(path).exists() or not run.is_dir() else str(run)


# What the commands print.


def describe(path: str, *, tensors: bool = False) -> Iterator[str]:
    """Yields lines on each checkpoint at `path`, newest first; reads only manifests and headers.

    Args:
        path: A checkpoint, a run, its checkpoints, or a URL of them.
        tensors: Whether to list every tensor.
    """
    storage, newest_first = choose(open_storage("."), located(path))
    readable = [each for each in newest_first if each.manifest is not None]
    for each in newest_first:
        yield f"{storage.root}/{each.folder}"
        if each.manifest is None:
            yield f"  BROKEN: {each.error}"
            continue

        older = readable[readable.index(each) + 1 :]
        yield from _describe_manifest(each.manifest, older[0].manifest if older else None)
        if tensors and each is readable[0]:
            yield from _describe_params(storage, each.folder, each.manifest)
        for name in sorted(each.manifest.files):
            yield f"  {name}: {each.manifest.files[name].size:,} bytes"
            if tensors and name.endswith(".safetensors"):
                yield from _describe_tensors(storage, each.folder, name, each.manifest)


def check(path: str) -> Iterator[tuple[str, bool]]:
    """Yields one line per checkpoint at `path` and whether it is whole; reads every byte.

    Args:
        path: A checkpoint, a run, its checkpoints, or a URL of them.
    """
    storage, newest_first = choose(open_storage("."), located(path))
    for each in newest_first:
        where = f"{storage.root}/{each.folder}"
        try:
            size = reader.verify(storage, each.folder).size_bytes
        except (CheckpointError, OSError) as error:
            if each.folder not in storage.folders():
                continue  # its run has deleted it in the meantime
            yield f"BAD   {where}: {error}", False
        else:
            yield f"whole {where}: {size:,} bytes", True


def _describe_manifest(manifest: Manifest, older: Manifest | None) -> Iterator[str]:
    about = {key: value for key, value in manifest.about.items() if key != "rng"}
    yield f"  step {manifest.step}, {manifest.world_size} rank(s), {manifest.size_bytes:,} bytes"
    for title, value in (("progress", manifest.progress), ("about", about or None)):
        if value is not None:
            yield f"  {title}: {json.dumps(value, sort_keys=True)}"
    if manifest.config is None:
        return

    # A configuration has a hundred lines, and checkpoints of one run mostly the same one.
    if older is None or older.config is None:
        yield "  config:"
        yield from (f"    {line}" for line in yaml.safe_dump(manifest.config, sort_keys=False).splitlines())
    elif changes := list(differences(older.config, manifest.config)):
        yield f"  config, changed since step {older.step}:"
        yield from (f"    {key}: {before!r} -> {now!r}" for key, before, now in changes)
    else:
        yield f"  config: that of step {older.step}"


def _describe_params(storage: Storage, folder: str, manifest: Manifest) -> Iterator[str]:
    """Yields a line for each replicated parameter: name, shape, constraint, and its optimizer's state."""
    reader_of_state = StateReader(storage, folder, manifest, REPLICATED)
    replicated = load_replicated(reader_of_state)
    yield "  parameters:"
    for name, entry in replicated["params"].items():
        value = entry["value"]
        constraint = (entry.get("constraint") or {}).get("name", "real")
        states = [states[name] for states in replicated["optimizers"].values() if name in states]
        yield f"    {name}: {str(value.dtype)[6:]} {list(value.shape)}, {constraint}{_describe_states(states)}"


def _describe_states(states: Sequence[Any]) -> str:
    """Returns what an optimizer keeps of a parameter: its step, its learning rate, and the names of its moments."""
    texts = []
    for state in map(optimizer_state, states):
        values = state["state"].get(0, {})
        if "step" in values:
            texts.append(f"step {int(values['step'])}")
        if "lr" in state["param_groups"][0]:
            texts.append(f"lr {float(state['param_groups'][0]['lr']):g}")
        texts += [key for key in values if key != "step"]
    return f", optimizer: {', '.join(texts)}" if texts else ""


def _describe_tensors(storage: Storage, folder: str, name: str, manifest: Manifest) -> Iterator[str]:
    with reader.CheckedFile(storage, folder, name, manifest.files[name], manifest) as file:
        entries, _ = file.header()
    for entry in entries.values():
        yield f"    {entry.name}: {entry.dtype} {list(entry.shape)}"


if __name__ == "__main__":
    app(prog_name="distopt checkpoint")

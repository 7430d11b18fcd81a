"""From which checkpoint a run resumes or starts, and what it says about that."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from distopt.checkpoint import Restored
from distopt.config import RunConfig
from distopt.config.paths import is_url


def which_checkpoint(config: RunConfig, *, has_checkpoints: bool) -> tuple[str | int, bool]:
    """Returns what to pass to `Checkpointer.restore`, and whether it is where a new run starts.

    A path of another run is only the start: when the workers are restarted, or the command is given again, the run has
    checkpoints of its own and resumes from them.

    Args:
        config: The run.
        has_checkpoints: Whether it has checkpoints already.
    """
    resume = config.checkpoint.resume
    if isinstance(resume, str) and resume.isdecimal() and len(resume) < 19:  # a longer number is the name of a folder
        return int(resume), False
    if isinstance(resume, int) or resume in ("auto", "never") or _is_of(config, resume):
        return resume, False
    return ("auto", False) if has_checkpoints else (resume, True)


def _is_of(config: RunConfig, path: str) -> bool:
    """Returns whether a path is the run's directory, that of its checkpoints, or inside one of them."""
    folder = config.checkpoints()
    if is_url(path):
        return isinstance(folder, str) and f"{path}/".startswith(f"{folder.rstrip('/')}/")
    resolved = Path(path).resolve()
    homes = [each.resolve() for each in (config.run_dir, folder) if isinstance(each, Path)]
    return any(home in (resolved, *resolved.parents) for home in homes)


def describe_restored(restored: Restored, config: RunConfig, world_size: int, *, is_new: bool) -> Iterator[str]:
    """Yields lines on what was restored and what is different now.

    Args:
        restored: What the checkpointer returned.
        config: The run.
        world_size: Its number of workers.
        is_new: Whether the run starts from another one's checkpoint.
    """
    taken = "" if restored.only is None else f", {' and '.join(restored.only)} only"
    workers = "" if restored.world_size == world_size else f", saved by {restored.world_size} workers"
    if is_new:
        yield f"starting from the checkpoint of another run at step {restored.step:,} ({restored.path}{taken}{workers})"
    else:
        yield f"resuming from step {restored.step:,} ({restored.path}{taken}{workers})"
    yield from restored.changes

    before = restored.config.get("train", {}).get("num_steps") if isinstance(restored.config, dict) else None
    if not is_new and before not in (None, config.train.num_steps):
        yield f"num_steps {before} -> {config.train.num_steps}"

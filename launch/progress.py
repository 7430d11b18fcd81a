"""How far a run is: what its metrics, its facts and its checkpoints say, without a process of it being asked."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distopt.config import checkpoints_of
from distopt.launchers import METRICS_FILE
from distopt.run_files import MANIFEST, checkpoints_in, read_facts, read_metrics, step_of

_TAIL_BYTES = 65536


@dataclass(frozen=True)
class Progress:
    """What a run's directory tells about its training.

    Attributes:
        step: Steps done at the last row of its metrics.
        num_steps: Steps of the whole run, None if it is not known.
        elbo: Of that row, in nats; None where it was not finite.
        rows_per_s: Rows of the data a second, over all ranks.
        left_s: Seconds that the steps left take at the pace of the last ones; None if it is not known.
        logged_s_ago: Seconds since the row was written.
        checkpoint: Step of the newest checkpoint, None without one.
        checkpoint_s_ago: Seconds since it was committed.
    """

    step: int
    num_steps: int | None
    elbo: float | None
    rows_per_s: float | None
    left_s: float | None
    logged_s_ago: float
    checkpoint: int | None
    checkpoint_s_ago: float | None

    def __str__(self) -> str:
        """Returns one line for people."""
        total = f" of {self.num_steps:,}" if self.num_steps is not None else ""
        texts = [f"step {self.step:,}{total}"]
        if self.elbo is not None:
            texts.append(f"ELBO {self.elbo:,.0f}")
        if self.rows_per_s is not None:
            texts.append(f"{self.rows_per_s:,.0f} rows/s")
        if self.left_s:
            texts.append(f"{duration(self.left_s)} left")
        if self.checkpoint is not None and self.checkpoint_s_ago is not None:
            texts.append(f"checkpoint of step {self.checkpoint:,}, {duration(self.checkpoint_s_ago)} ago")
        return ", ".join(texts)

    def as_json(self) -> dict[str, Any]:
        """Returns the attributes by name."""
        return asdict(self)


def progress_of(run_dir: Path) -> Progress | None:
    """Returns how far a run is; None for one that has logged nothing, such as that of a script."""
    rows = read_metrics(run_dir, _TAIL_BYTES)  # the first line of which is mostly cut, and left out
    if not rows:
        return None
    last = rows[-1]
    facts = read_facts(run_dir)
    now = time.time()
    num_steps = facts.get("num_steps")

    # `train_s` leaves out the time between two processes of the run, so a resumed run has the right pace at once.
    left_s = None
    pair = [row for row in rows[-2:] if isinstance(row.get("train_s"), float)]
    if len(pair) == 2 and num_steps is not None and pair[1]["step"] > pair[0]["step"]:
        pace_s = (pair[1]["train_s"] - pair[0]["train_s"]) / (pair[1]["step"] - pair[0]["step"])
        left_s = max(0.0, pace_s * (num_steps - last["step"]))
    if facts.get("outcome") == "done":
        left_s = 0.0

    folder = checkpoints_of(run_dir)
    checkpoint, saved_at = _newest_checkpoint(folder) if isinstance(folder, Path) else (None, None)
    return Progress(
        step=int(last["step"]),
        num_steps=num_steps,
        elbo=last.get("elbo"),
        rows_per_s=last.get("rows_per_s"),
        left_s=left_s,
        logged_s_ago=max(0.0, now - (run_dir / METRICS_FILE).stat().st_mtime),
        checkpoint=checkpoint,
        checkpoint_s_ago=None if saved_at is None else max(0.0, now - saved_at),
    )


def duration(seconds: float) -> str:
    """Returns a duration in its two largest units.

    Example:
        >>> duration(5), duration(65), duration(7300), duration(200000)
        ('5 s', '1 min 5 s', '2 h 1 min', '2 d 7 h')
    """
    whole = int(seconds)
    for unit, size, smaller, small_size in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // small_size} {smaller}"
    return f"{whole} s"


def _newest_checkpoint(directory: Path) -> tuple[int | None, float | None]:
    """Returns step and time of the checkpoint that was committed last."""
    newest: tuple[int | None, float | None] = (None, None)
    for folder in checkpoints_in(directory):
        try:
            saved_at = (folder / MANIFEST).stat().st_mtime
        except OSError:  # deleted by the run in the meantime
            continue
        if newest[1] is None or saved_at > newest[1]:
            newest = (step_of(folder.name), saved_at)
    return newest

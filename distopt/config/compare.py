"""Where two configurations differ, and which differences a resume accepts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from copy import deepcopy
from typing import Any

MAY_CHANGE = (
    "name",
    "run_dir",
    "launch",
    "log",
    "serve",
    "checkpoint",
    "data.prefetch",
    "train.num_steps",
    "train.check_steps",
    "train.device",
    "train.compile_from_step",
    "train.capture",  # a captured step computes what an eager one does
    "train.validate_every_steps",
    "train.early_stopping",
    "optim.args",  # what differs in these is put in place of the checkpoint's, see `distopt.optim.settings`
    "optim.args_by_name",
    "optim.clip",
    "optim.nonfinite",
    "optim.max_skipped_in_row",
    "optim.scheduler",
    "reduce.backend",
    "reduce.bucket_mib",
    "reduce.overlap",
    "reduce.drift_every_steps",
    "reduce.timeout_s",
)
"""Keys that may differ when a run resumes from its checkpoints: where and how long it runs, how it steps from there.

Everything else is compared. `reduce.op`, `compression` and `power_sgd_rank` change every step of the optimizer, so a
run with another one of them would not continue the run that was saved.
"""

ADDED_LATER: Mapping[str, Any] = {
    "data.shard_fraction": None,
    "train.precision": 32,
    "reduce.groups": [],
    "reduce.gradient_predivide_factor": 1.0,
    "reduce.sparse_as_dense": False,
    "reduce.backward_passes_per_step": 1,
}
"""Keys that the configurations of older checkpoints lack, with the value that their runs had.

A new key that is compared on resume belongs here, or runs of older versions could no longer resume.
"""


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()
"""Stands for the value of a key that is not there."""


def differences(old: Any, new: Any, ignore: Collection[str] = (), prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields the dotted keys at which two configurations differ, with both values.

    Args:
        old: Nested mappings; lists are compared as a whole.
        new: Likewise.
        ignore: Dotted keys that may differ, with all below them.
        prefix: The dotted key of both, empty for whole configurations.

    Example:
        >>> list(differences({"optim": {"lr": 1}, "log": 1}, {"optim": {"lr": 2}, "seed": 1}, ignore=["log"]))
        [('optim.lr', 1, 2), ('seed', absent, 1)]
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(key for key in new if key not in old)]:
            dotted = f"{prefix}.{key}" if prefix else str(key)
            if dotted not in ignore:
                yield from differences(old.get(key, ABSENT), new.get(key, ABSENT), ignore, dotted)
    elif old != new:
        yield prefix, old, new


def comparable(config: Any) -> Any:
    """Returns a copy of a run's configuration without the keys of `ADDED_LATER` that have the value given there.

    Of two configurations, one recorded before such a key existed and one after, these are equal where the runs are.

    Args:
        config: As `RunConfig.as_json()` returns it, in this version or an older one. Anything else, such
            as what a damaged file holds, is returned as it is.

    Example:
        >>> comparable({"reduce": {"op": "sum", "sparse_as_dense": False, "backward_passes_per_step": 2}})
        {'reduce': {'op': 'sum', 'backward_passes_per_step': 2}}
    """
    copied = deepcopy(config)
    for dotted, value in ADDED_LATER.items():
        *sections, key = dotted.split(".")
        section = copied
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict) and section.get(key, ABSENT) == value:
            del section[key]
    return copied

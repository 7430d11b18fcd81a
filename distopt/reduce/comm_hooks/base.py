"""The contract of communication hooks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from distopt.backends import Backend
from distopt.config.reduce import ReduceOptions
from distopt.reduce.layout import Bucket
from distopt.reduce.messages import RoundSummary


class CommHook(ABC):
    """One way to sum a bucket's gradients over all ranks.

    All ranks use the same hook and call its methods in the same order, bucket by bucket. A subclass needs `start` and
    `finish`; everything else has a default. It is made with these two arguments, and must not keep a bucket: a new
    layout has new ones.

    Args:
        backend: Link to the other ranks.
        options: How gradients are reduced.

    Example:
        A hook that sums in float64, named in a YAML as `reduce: {compression: "mymodule:Wide"}`:

        >>> class Wide(CommHook):
        ...     def start(self, bucket):
        ...         sent = bucket.flat.double()
        ...         return self.backend.all_reduce(sent), sent
        ...
        ...     def finish(self, bucket, started, summary):
        ...         handle, sent = started
        ...         handle.wait()
        ...         bucket.flat.copy_(sent)
    """

    carries_control: ClassVar[bool] = False
    """Whether what it does to `bucket.buffer` is an exact sum, so that a bucket may carry the control slots."""

    divides_first: ClassVar[bool] = False
    """Whether gradients are to be divided by the world size before `start`, so that their sum does not overflow."""

    can_overlap: ClassVar[bool] = False
    """Whether `start` may be called during the backward pass: all that it sends, it sends in `start`."""

    has_rank_local_state: ClassVar[bool] = False
    """Whether it keeps from step to step what differs between ranks, to be saved with each rank's checkpoint."""

    def __init__(self, backend: Backend, options: ReduceOptions) -> None:
        self.backend = backend
        self.options = options

    @abstractmethod
    def start(self, bucket: Bucket) -> Any:
        """Starts to combine `bucket.flat` over all ranks; several buckets may be started before one is finished.

        Returns:
            Whatever `finish` needs, such as the handle of a collective.
        """

    @abstractmethod
    def finish(self, bucket: Bucket, started: Any, summary: RoundSummary | None) -> None:
        """Returns when `bucket.flat` holds the sum over all ranks, equal on all of them bit by bit.

        Args:
            bucket: One that was started.
            started: What `start` returned for it.
            summary: What the ranks know from the control slots; None for the bucket that carries them, which is passed
                to no hook but those that `carries_control`.
        """

    def forget(self, names: set[str]) -> None:  # noqa: B027  # optional: most hooks keep nothing
        """Drops what is kept of these parameters from step to step: they are new, gone, or were not stepped."""

    def state_dict(self) -> dict[str, Any]:
        """Returns what is kept from step to step; tensors may be the live ones."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027  # as above
        """Continues from what `state_dict` returned."""

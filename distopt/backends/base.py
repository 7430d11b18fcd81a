"""The contract of backends: what one rank can say to the others, and what a backend of your own implements."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from datetime import timedelta
from typing import Any, ClassVar, Literal, Protocol, Self, TypeAlias

import torch
from torch import Tensor

from distopt.launchers import RankInfo

Json: TypeAlias = Any
"""What `json` can carry: None, bool, int, float, str, and lists and string-keyed dicts of these."""

Op: TypeAlias = Literal["sum", "min", "max"]

DEFAULT_TIMEOUT = timedelta(minutes=5)

JSON_HEAD_BYTES = 4096
"""JSON up to this length (less 8 bytes for the length) is sent in one collective, longer JSON in two."""


class BackendError(RuntimeError):
    """A collective that failed or never finished; the message names rank, world size and what to check."""


class MismatchError(BackendError):
    """Another rank makes another call than this one; the message names both."""


class Handle(Protocol):
    """A collective that has been started."""

    def wait(self, timeout: timedelta | None = None) -> None:
        """Returns when the result is in the tensor.

        Args:
            timeout: How long to wait; the backend's own timeout when None.

        Raises:
            BackendError: The timeout passed first, or a rank failed. After a timeout the collective is still under way,
                and `wait` may be called again.
        """


class Backend(ABC):
    """One rank's link to the others of its world.

    All ranks must call the same collectives in the same order; `distopt.reduce` ensures that order. Every wait takes a
    timeout, None meaning the one given to `init`. Objects are sent as JSON and never as pickles, since unpickling bytes
    from the network would run whatever code they name.

    A backend of your own is a subclass that implements `start`, `all_reduce`, `broadcast` and `all_gather`; the rest
    has defaults that build on these. Name it as `init("module:Name")`, or as `reduce.backend: module:Name` in a YAML.

    Args:
        rank_info: This process's rank and the world's size.
        device: Where parameters live by default; the CPU when None.
        timeout: For every wait that is not given its own.

    Attributes:
        name: What messages call the backend.
        rank: This process, from 0 to `world_size - 1`.
        local_rank: This process among those of its host.
        node_rank: The number of this process's host.
        world_size: Number of processes.
        device: Where parameters live by default.
        timeout: For every wait that is not given its own; it may be changed.
        closed: Whether `close` has been called; `init` then makes a new backend.
        all_reduce_s: Seconds spent so far in waiting for `all_reduce`.
        all_reduce_bytes: Bytes given to `all_reduce` so far.
    """

    name: ClassVar[str] = "backend"

    def __init__(
        self, rank_info: RankInfo, *, device: torch.device | None = None, timeout: timedelta = DEFAULT_TIMEOUT
    ) -> None:
        self.rank: int = rank_info.rank
        self.world_size: int = rank_info.world_size
        self.local_rank: int = rank_info.local_rank or 0
        self.node_rank: int = rank_info.node_rank or 0
        self.device: torch.device = device or torch.device("cpu")
        self.timeout = timeout
        self.closed: bool = False
        self.all_reduce_s: float = 0.0
        self.all_reduce_bytes: int = 0

    @classmethod
    @abstractmethod
    def start(cls, rank_info: RankInfo | None, *, timeout: timedelta) -> Self:
        """Joins the world that the launcher started, and returns the link to it; `init` calls this.

        Args:
            rank_info: What the launcher told this process; None for a process that was started by hand.
            timeout: For meeting the others, and for every later wait.

        Raises:
            BackendError: The ranks did not meet, or a library is missing; says what to change.

        Cost:
            Collective: all ranks call it.
        """

    @property
    def control_device(self) -> torch.device:
        """The device of small tensors that the host reads at once: JSON, flags, counts."""
        return torch.device("cpu")

    @abstractmethod
    def all_reduce(self, tensor: Tensor, op: Op = "sum") -> Handle:
        """Starts combining `tensor` over all ranks, in place; it must not be touched before `wait`.

        Args:
            tensor: Any shape and dtype, equal on all ranks; overwritten.
            op: What becomes of the ranks' values.
        """

    def sum_buffer(self, buffer: Tensor) -> Handle:
        """Starts summing a buffer of distopt's own over all ranks, in place; the reducer calls it for each bucket.

        It is `all_reduce` where a backend has nothing quicker. All ranks also wait for their sums in the same order.

        Args:
            buffer: One contiguous tensor, of one length and dtype on all ranks; overwritten.
        """
        return self.all_reduce(buffer)

    @abstractmethod
    def broadcast(self, tensor: Tensor, root: int = 0) -> Handle:
        """Starts overwriting `tensor` with that of rank `root`; it must not be touched before `wait`.

        Args:
            tensor: Any shape and dtype, equal on all ranks; overwritten on all but `root`.
            root: The rank whose values all get.
        """

    @abstractmethod
    def all_gather(self, tensor: Tensor, timeout: timedelta | None = None) -> Tensor:
        """Returns every rank's `tensor`, stacked in the order of ranks.

        Args:
            tensor: One shape and dtype on all ranks.
            timeout: How long to wait; the backend's own timeout when None.

        Returns:
            A new tensor of shape (world_size, *shape).
        """

    def send_recv(self, tensor: Tensor, peer: int | None, timeout: timedelta | None = None) -> Tensor | None:
        """Sends `tensor` to one rank and returns what that rank sends here.

        All ranks call it, in pairs that name each other; a rank without a partner calls it too.

        Args:
            tensor: One shape and dtype on all ranks.
            peer: The partner; None takes part without one.
            timeout: How long to wait; the backend's own timeout when None.

        Returns:
            The partner's tensor; None without a partner.

        Cost:
            By default that of `all_gather`, `world_size` times the bytes that are needed.
        """
        gathered = self.all_gather(tensor, timeout)
        return None if peer is None else gathered[peer]

    def all_gather_json(self, value: Json, timeout: timedelta | None = None) -> list[Json]:
        """Returns every rank's `value`, in the order of ranks.

        Args:
            value: Anything that JSON can carry.
            timeout: For each wait; the backend's own timeout when None.

        Cost:
            One all-gather of 4 KiB a rank. Where some rank's JSON is longer, a second one of the longest rest.
        """
        payload = json.dumps(value).encode()
        head_bytes = JSON_HEAD_BYTES - 8
        head = _as_tensor(len(payload).to_bytes(8, "little") + payload[:head_bytes], JSON_HEAD_BYTES)
        heads = self._gather_bytes(head, timeout)

        # Each rank reads all lengths, so all of them know whether there is a second collective, and how long it is.
        lengths = [int.from_bytes(row[:8], "little") for row in heads]
        texts = [row[8 : 8 + length] for row, length in zip(heads, lengths, strict=True)]
        longest = max(lengths)
        if longest > head_bytes:
            rests = self._gather_bytes(_as_tensor(payload[head_bytes:], longest - head_bytes), timeout)
            texts = [
                text + rest[: max(0, length - head_bytes)]
                for text, rest, length in zip(texts, rests, lengths, strict=True)
            ]
        return [json.loads(text) for text in texts]

    def barrier(self, timeout: timedelta | None = None) -> None:
        """Returns when all ranks have called it.

        Args:
            timeout: How long to wait; the backend's own timeout when None.

        Cost:
            One all-reduce of one number.
        """
        self.all_reduce(torch.zeros(1, device=self.control_device)).wait(timeout)

    def note(self, step: int, phase: str) -> None:
        """Records where this rank is, for the error messages of others; by default nothing does.

        Args:
            step: The step that this rank is at.
            phase: What it is doing there, such as `model`.
        """
        return None

    def fail(self, error: BaseException) -> None:
        """Reports why this rank stops, so that the others raise this cause at once; by default they time out.

        Args:
            error: What this rank is about to raise.
        """
        return None

    def close(self) -> None:
        """Leaves the world; calling it twice does nothing."""
        self.closed = True

    def _gather_bytes(self, data: Tensor, timeout: timedelta | None) -> list[bytes]:
        return [bytes(row) for row in self.all_gather(data.to(self.control_device), timeout).cpu().tolist()]


def _as_tensor(data: bytes, length: int) -> Tensor:
    """Bytes as a tensor of a given length, padded with zeros."""
    return torch.frombuffer(bytearray(data.ljust(length, b"\0")), dtype=torch.uint8)

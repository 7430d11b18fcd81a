"""The side channel: each rank's heartbeat and the first failure, so that an error can name its cause."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from torch._C._distributed_c10d import Store, TCPStore

from distopt.backends.base import BackendError, Json

T = TypeVar("T")

BEAT_S = 0.5
"""Seconds between two heartbeats of a rank, and between two looks at whether another has failed."""

BEATS, ASKS = "distopt-watch", "distopt-ask"
"""The names of the threads that speak to stores."""


@dataclass(frozen=True)
class Failure:
    """What a rank said before it stopped; one that has `ended` did so by itself, and the others still wait for it."""

    rank: int
    step: int
    phase: str
    error: str  # "ValueError: the message"
    traceback: str
    ended: bool = False

    def __str__(self) -> str:
        if self.ended:
            return (
                f"rank {self.rank} has left the run after step {self.step}, and the others still wait for it. Every "
                "rank must make the same calls; for uneven data use `with optimizer.join():`"
            )
        return f"rank {self.rank} failed first, at step {self.step} in phase {self.phase!r}: {self.error}"


class Watch:
    """One rank's heartbeat in a store all ranks can reach, kept by a daemon thread.

    It never takes part in a collective, so it still speaks when a collective hangs. A store's server can itself be what
    died, and a torch store can then block for ever, so every read from another thread goes through `_within`.

    Args:
        store: A client of this watch alone.
        rank: This process's.
        world_size: How many ranks write here.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.step, self.phase, self.calls = 0, "init", 0
        self.failure: Failure | None = None
        self._store, self._lock = store, threading.Lock()
        self._stop, self._beat = threading.Event(), 0
        self._publish()
        self._thread = threading.Thread(target=self._run, name=BEATS, daemon=True)
        self._thread.start()

    def fail(self, error: str, traceback: str, linger_s: float) -> None:
        """Publishes why this rank stops, unless another was first; stays until all have read it, or `linger_s`."""
        own = Failure(self.rank, self.step, self.phase, error, traceback)
        within(linger_s + 1.0, lambda: self._tell(own, linger_s))

    def end(self) -> None:
        """Publishes that this rank takes part in nothing any more, unless it has failed."""
        own = Failure(self.rank, self.step, self.phase, "", "", ended=True)
        within(1.0, lambda: self._store.compare_set("ended", "", json.dumps(vars(own))))

    def look(self, patience_s: float) -> Failure | None:
        """Returns the first failure, waiting up to `patience_s` for one to be told."""
        deadline = time.monotonic() + patience_s
        while self.failure is None and time.monotonic() < deadline:
            if self._stop.wait(0.05):
                break
        return self.failure

    def describe_missing(self, ranks: list[int] | None = None) -> str:
        """Says which ranks are behind this one or silent, and where each was last seen.

        Two readings, a little more than a heartbeat apart, tell a living rank from one that stopped: clocks of
        different machines are never compared.
        """
        first = within(5.0, self._read_all)
        time.sleep(2.5 * BEAT_S)
        second = within(5.0, self._read_all)
        if first is None or second is None:
            return "the store on rank 0's side does not answer: that process or its machine is stopped or unreachable"
        lines = []
        for rank in ranks if ranks is not None else range(self.world_size):
            seen, still = second.get(rank), first.get(rank)
            if rank == self.rank:
                continue
            if seen is None:
                lines.append(f"rank {rank} (never seen)")
            elif still is not None and seen["beat"] == still["beat"]:
                lines.append(f"rank {rank} (stopped or unreachable; last seen at {_where(seen)})")
            elif seen["calls"] < self.calls:
                lines.append(f"rank {rank} (alive, at {_where(seen)})")
        return ", ".join(lines) or "none: all other ranks are alive and have started this collective"

    def close(self) -> None:
        """Ends the heartbeat; returns after at most 2 s, even if the store does not answer."""
        self._stop.set()
        self._thread.join(timeout=2)

    @staticmethod
    def is_stuck() -> bool:
        """Whether a thread of this process still waits for an answer of a store.

        Should the answer come while Python ends, it would end the thread within the store's C++ code, which aborts.
        """
        return any(thread.name in (BEATS, ASKS) for thread in threading.enumerate())

    def _run(self) -> None:
        try:
            while not self._stop.wait(BEAT_S):
                self._publish()
                if self.failure is None:
                    self._look()
        except RuntimeError:  # the store's server is gone; whoever waits for it will say so
            return

    def _publish(self) -> None:
        self._beat += 1
        place = {"beat": self._beat, "step": self.step, "phase": self.phase, "calls": self.calls}
        with self._lock:
            self._store.set(f"beat/{self.rank}", json.dumps(place))

    def _look(self) -> None:
        with self._lock:
            if self._store.check(["failure"]):
                told = json.loads(self._store.get("failure"))
                self._store.set(f"heard/{self.rank}", "1")
            elif self._store.check(["ended"]):
                told = json.loads(self._store.get("ended"))
            else:
                return
        if told["rank"] != self.rank:
            self.failure = Failure(**told)

    def _tell(self, own: Failure, linger_s: float) -> None:
        with self._lock:
            first = json.loads(self._store.compare_set("failure", "", json.dumps(vars(own))))
            self._store.set(f"heard/{self.rank}", "1")
        others = [f"heard/{rank}" for rank in range(self.world_size)]
        deadline = time.monotonic() + (linger_s if first["rank"] == self.rank else 0)
        while time.monotonic() < deadline:
            with self._lock:
                if self._store.check(others):
                    return
            time.sleep(0.05)

    def _read_all(self) -> dict[int, dict[str, Any]]:
        with self._lock:
            keys = {rank: f"beat/{rank}" for rank in range(self.world_size)}
            return {rank: json.loads(self._store.get(key)) for rank, key in keys.items() if self._store.check([key])}


def within(seconds: float, call: Callable[[], T]) -> T | None:
    """Returns `call()`, or None when it raises or has not returned after `seconds` (it is then left behind)."""
    result: list[T] = []

    def run() -> None:
        try:
            result.append(call())
        except RuntimeError:  # a store's way to say that it is gone
            pass

    thread = threading.Thread(target=run, name=ASKS, daemon=True)
    thread.start()
    thread.join(seconds)
    return result[0] if result else None


def _where(seen: dict[str, Any]) -> str:
    return f"step {seen['step']}, phase {seen['phase']!r}"


# A store for the side channel where the library brings none: a TCP store on rank 0, bound to one address.


CLIENT_TIMEOUT = timedelta(seconds=30)


def make_side_store(rank: int, gather: Callable[[Json], list[Json]]) -> Store:
    """Returns a client of a new store on rank 0; a collective call.

    The server listens on the loopback address when all ranks share a machine, else on rank 0's own address, never on
    all
    interfaces: it asks nobody for a password. It holds JSON and is read by nothing that unpickles.

    Args:
        rank: This process's.
        gather: An `all_gather_json`.
    """
    hosts = gather(socket.gethostname())
    address, listener = "127.0.0.1", None
    if rank == 0:
        if len(set(hosts)) > 1:
            address = _own_address()
        listener = socket.create_server((address, 0))
    where = gather([address, listener.getsockname()[1]] if listener is not None else None)[0]
    try:
        return TCPStore(
            where[0],
            where[1],
            is_master=rank == 0,
            wait_for_workers=False,
            timeout=CLIENT_TIMEOUT,
            master_listen_fd=listener.detach() if listener is not None else None,
        )
    except RuntimeError as error:
        raise BackendError(
            f"rank {rank} cannot reach rank 0's heartbeat store at {where[0]}:{where[1]}. Check that the name "
            f"{hosts[0]!r} means an address that the other machines can reach. torch says: {error}"
        ) from error


def _own_address() -> str:
    try:
        return socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)[0][4][0].__str__()
    except OSError as error:
        raise BackendError(
            f"rank 0's host name {socket.gethostname()!r} has no address. Give it one in the hosts file."
        ) from error

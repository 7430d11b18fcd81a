"""The side channel: a store with each rank's heartbeat and the first failure, so that an error can name its cause."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, TypeVar

from torch._C._distributed_c10d import Store, TCPStore

from distopt.backends.base import BackendError, Json
from distopt.backends.process_ends import has_ended, this_process

T = TypeVar("T")

BEAT_S = 0.5
"""Seconds between two heartbeats of a rank, and between two checks whether another has failed."""

SILENCE_BEATS = 2.5
"""A rank without a heartbeat for as many of them has stopped."""

CLIENT_TIMEOUT = timedelta(seconds=30)
"""How long a rank tries to reach the store on rank 0."""

_NO_STORE = "rank 0, whose store does not answer: its process or machine has stopped or is unreachable"

BEAT_THREAD = "distopt-heartbeat"
STORE_THREAD = "distopt-store-call"
"""The names of the threads that call stores."""


@dataclass(frozen=True)
class Failure:
    """Why a rank stopped, as it reported itself.

    Attributes:
        rank: Whose report it is.
        step: The step that the rank was at.
        phase: What it was doing there.
        error: The exception's type and message, as in "ValueError: a bad row".
        traceback: The exception's traceback.
        exited: Whether it left without an error while others still wait for it.
    """

    rank: int
    step: int
    phase: str
    error: str
    traceback: str
    exited: bool = False

    def __str__(self) -> str:
        if self.exited:
            return (
                f"rank {self.rank} exited after step {self.step} while other ranks were still waiting for it. Every "
                "rank must make the same calls; for uneven data use `with optimizer.join():`"
            )
        return f"rank {self.rank} failed first, at step {self.step} in phase {self.phase!r}: {self.error}"


# Collectives cannot carry news of a failure: a rank that failed takes part in none, and one that waits is inside C++
# code. So every rank has a second connection, to a small store that lives on rank 0, and a thread that writes to it
# twice a second. It has these keys:
#   beat/RANK   where the rank is, with a counter that tells a living rank from one that stopped, and its process
#   failure     the first Failure; compare_set lets one rank win, so all of them report one cause
#   seen/RANK   set once the rank has read `failure`; who failed waits for these, so that nobody misses the cause
#   exited      the first rank that left without an error


class Heartbeat:
    """One rank's heartbeat in a store that all ranks can reach, kept by a daemon thread.

    It takes part in no collective, so it still works while a collective hangs. The store's server can itself be what
    died, and a call of a torch store can then block without end, so every call from another thread than the heartbeat's
    goes through `call_within`.

    Args:
        store: A client that is used here and nowhere else.
        rank: This process's rank.
        world_size: How many ranks write to the store.

    Attributes:
        step: The step that this rank is at; the backend's `note` sets it.
        phase: What this rank is doing there.
        calls: Number of collectives that this rank has started.
        failure: The first failure of another rank, once this one has read it.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.step = 0
        self.phase = "init"
        self.calls = 0
        self.failure: Failure | None = None

        self._store = store
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._beat = 0
        self._process = this_process()
        self._publish_beat()
        self._thread = threading.Thread(target=self._run, name=BEAT_THREAD, daemon=True)
        self._thread.start()

    def fail(self, error: str, traceback: str, linger_s: float) -> None:
        """Publishes why this rank stops, unless another was first; returns once all have read it, or after a while.

        Args:
            error: The exception's type and message.
            traceback: The exception's traceback.
            linger_s: How long to stay for the others.
        """
        failure = Failure(self.rank, self.step, self.phase, error, traceback)
        call_within(linger_s + 1.0, lambda: self._publish_failure(failure, linger_s))

    def exit(self) -> None:
        """Publishes that this rank takes part in no further collective; a failure that was published stays."""
        failure = Failure(self.rank, self.step, self.phase, "", "", exited=True)
        call_within(1.0, lambda: self._store.compare_set("exited", "", json.dumps(asdict(failure))))

    def wait_for_failure(self, timeout_s: float) -> Failure | None:
        """Returns the first failure of another rank, or None when none is published in time."""
        deadline = time.monotonic() + timeout_s
        while self.failure is None and time.monotonic() < deadline:
            if self._stop.wait(0.05):
                break
        return self.failure

    def failure_or_missing(self, timeout_s: float) -> Failure | str:
        """Returns the first failure of another rank, or in its place what `describe_missing` does.

        A rank that failed lives until the others have read why. So where one is silent for longer than a heartbeat, or
        its process has ended, its word will not come, and it is not waited for: a run whose worker was killed stands
        still meanwhile. Ends are seen on this machine at once; of other machines nothing but silence is.

        Args:
            timeout_s: How long to wait for the failure while all ranks are alive.
        """
        first = call_within(5.0, self._read_beats)
        if first is None:  # nothing can come through a store that does not answer
            return self.failure or _NO_STORE

        deadline = time.monotonic() + timeout_s
        ended = self._failed_or_ended(first, min(timeout_s, SILENCE_BEATS * BEAT_S))
        second = call_within(5.0, self._read_beats)
        if self.failure is None and not ended and second is not None and not self._silent(first, second):
            ended = self._failed_or_ended(first, deadline - time.monotonic())
            second = call_within(5.0, self._read_beats)
        # It may have been published between the last look of this rank's heartbeat and the end of who published it.
        call_within(5.0, self._read_failure)
        if self.failure is not None:
            return self.failure
        if ended:
            return ", ".join(f"rank {rank} (its process has ended; {_last_seen(first[rank])})" for rank in ended)
        return self._compare(first, second)

    def _failed_or_ended(self, beats: dict[int, dict[str, Any]], timeout_s: float) -> list[int]:
        """Returns the ranks whose processes have ended as soon as there are any, or none once `failure` is there."""
        deadline = time.monotonic() + timeout_s
        ended: list[int] = []
        while not ended and (left_s := deadline - time.monotonic()) > 0:
            if self.wait_for_failure(min(left_s, 0.1)) is not None or self._stop.is_set():
                break
            ended = [rank for rank, beat in beats.items() if has_ended(beat["process"])]
        return ended

    def describe_missing(self) -> str:
        """Returns which ranks are behind this one or silent, and where each was last seen."""
        first = call_within(5.0, self._read_beats)
        time.sleep(SILENCE_BEATS * BEAT_S)
        return self._compare(first, call_within(5.0, self._read_beats))

    def _silent(self, first: dict[int, dict[str, Any]], second: dict[int, dict[str, Any]]) -> list[int]:
        """Returns the other ranks without a heartbeat between two readings that are `SILENCE_BEATS` apart or more.

        The two tell a living rank from one that stopped: the clocks of two machines are never compared.
        """
        others = (rank for rank in first if rank != self.rank)
        return [rank for rank in others if second[rank]["beat"] == first[rank]["beat"]]

    def _compare(self, first: dict[int, dict[str, Any]] | None, second: dict[int, dict[str, Any]] | None) -> str:
        """Describes the ranks by two readings, of which each is None where the store did not answer."""
        if first is None or second is None:
            return _NO_STORE

        silent = self._silent(first, second)
        missing = []
        for rank in range(self.world_size):
            now = second.get(rank)
            if rank == self.rank:
                continue
            if now is None:
                missing.append(f"rank {rank} (never seen)")
            elif rank in silent:
                missing.append(f"rank {rank} (stopped or unreachable; {_last_seen(now)})")
            elif now["calls"] < self.calls:
                missing.append(f"rank {rank} (alive, at {_location(now)})")
        return ", ".join(missing) or "no other rank: all are alive and have started this collective"

    def close(self) -> None:
        """Ends the heartbeat; returns after at most 2 s, even if the store does not answer."""
        self._stop.set()
        self._thread.join(timeout=2)

    @staticmethod
    def is_stuck() -> bool:
        """Returns whether a thread of this process still waits for a store's answer.

        An answer that comes while Python ends would make Python end the thread within the store's C++ code, and abort.
        """
        return any(thread.name in (BEAT_THREAD, STORE_THREAD) for thread in threading.enumerate())

    def _run(self) -> None:
        try:
            while not self._stop.wait(BEAT_S):
                self._publish_beat()
                if self.failure is None:
                    self._read_failure()
        except RuntimeError:  # the store's server has gone; whoever waits in a collective reports that
            return

    def _publish_beat(self) -> None:
        self._beat += 1
        beat = {
            "beat": self._beat,
            "step": self.step,
            "phase": self.phase,
            "calls": self.calls,
            "process": self._process,
        }
        with self._lock:
            self._store.set(f"beat/{self.rank}", json.dumps(beat))

    def _read_failure(self) -> None:
        with self._lock:
            if self._store.check(["failure"]):
                failure = Failure(**json.loads(self._store.get("failure")))
                self._store.set(f"seen/{self.rank}", "1")
            elif self._store.check(["exited"]):
                failure = Failure(**json.loads(self._store.get("exited")))
            else:
                return
        if failure.rank != self.rank:
            self.failure = failure

    def _publish_failure(self, failure: Failure, linger_s: float) -> None:
        with self._lock:
            first = json.loads(self._store.compare_set("failure", "", json.dumps(asdict(failure))))
            self._store.set(f"seen/{self.rank}", "1")

        # Once this process ends, so may the store. The rank that failed first stays until all have read its cause.
        readers = [f"seen/{rank}" for rank in range(self.world_size)]
        deadline = time.monotonic() + (linger_s if first["rank"] == self.rank else 0)
        while time.monotonic() < deadline:
            with self._lock:
                if self._store.check(readers):
                    return
            time.sleep(0.05)

    def _read_beats(self) -> dict[int, dict[str, Any]]:
        with self._lock:
            keys = {rank: f"beat/{rank}" for rank in range(self.world_size)}
            return {rank: json.loads(self._store.get(key)) for rank, key in keys.items() if self._store.check([key])}


def call_within(timeout_s: float, call: Callable[[], T]) -> T | None:
    """Returns `call()`, or None where it raises or does not return in time; its thread is then left behind."""
    result: list[T] = []

    def run() -> None:
        try:
            result.append(call())
        except RuntimeError:  # how a store reports that its server has gone
            pass

    thread = threading.Thread(target=run, name=STORE_THREAD, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return result[0] if result else None


def _last_seen(beat: dict[str, Any]) -> str:
    return f"last seen at {_location(beat)}"


def _location(beat: dict[str, Any]) -> str:
    return f"step {beat['step']}, phase {beat['phase']!r}"


def start_store(rank: int, gather_json: Callable[[Json], list[Json]]) -> Store:
    """Starts a store on rank 0 and returns this rank's client, for libraries that come without a store.

    The server listens on the loopback address when all ranks share a machine, else on rank 0's own address, and never
    on all interfaces, since it asks for no password. It holds JSON, and nothing that reads it unpickles.

    Args:
        rank: This process's rank.
        gather_json: The backend's `all_gather_json`.

    Raises:
        BackendError: Rank 0 has no address, or this rank does not reach it.

    Cost:
        Collective: two calls of `gather_json`.
    """
    hosts = gather_json(socket.gethostname())
    address, listener = "127.0.0.1", None
    if rank == 0:
        if len(set(hosts)) > 1:
            address = _this_address()
        listener = socket.create_server((address, 0))
    address, port = gather_json([address, listener.getsockname()[1]] if listener is not None else None)[0]

    try:
        return TCPStore(
            address,
            port,
            is_master=rank == 0,
            wait_for_workers=False,
            timeout=CLIENT_TIMEOUT,
            master_listen_fd=listener.detach() if listener is not None else None,
        )
    except RuntimeError as error:
        raise BackendError(
            f"rank {rank} cannot reach rank 0's heartbeat store at {address}:{port}. Check that the host name "
            f"{hosts[0]!r} stands for an address that the other machines can reach. torch says: {error}"
        ) from error


def _this_address() -> str:
    try:
        return str(socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)[0][4][0])
    except OSError as error:
        raise BackendError(
            f"rank 0's host name {socket.gethostname()!r} has no address. Add one to the hosts file."
        ) from error

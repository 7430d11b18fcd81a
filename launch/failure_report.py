"""Who died first, of what, and who was merely waiting."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from distopt.launchers import CHECKPOINTS, LOGS

from .worker.events import End, Event, Start
from .worker.rank_log import last_attempt_lines, last_line, last_lines, log_of, traceback_of

# How a rank that did nothing wrong ends when another has gone; seen with gloo, NCCL, Horovod and MPI.
_BEREFT = re.compile(
    r"Connection (closed by peer|reset by peer|refused)|Broken pipe|[Tt]imed out|HorovodInternalError|"
    r"connectFullMesh|has been shut down|remote process exited|DistNetworkError|DistBackendError"
)
# What distopt raises on the ranks that a failed one has told of its error.
_TOLD = re.compile(r"PeerError: rank (?P<rank>\d+) of \d+ failed at (?P<what>step \d+: .*)")


def name(event: Event) -> str:
    """Says which worker, and where."""
    return f"rank {event.rank} on {event.host}"


def cause(event: Event) -> str:
    """Says how a worker ended, in words that name a signal."""
    status = event.status or 0
    if event.out_of_memory:
        return "was killed, out of memory: give the run more, or take a smaller batch"
    if status >= 0:
        return f"ended with exit status {status}"
    number = signal.Signals(-status)
    if number == signal.SIGKILL:
        return "was killed (SIGKILL): by someone, or out of memory? `dmesg -T | grep -i oom` tells on its host"
    return f"died of {number.name} ({signal.strsignal(number)})"


def last_attempt(seen: Sequence[Event]) -> list[Event]:
    """Returns the events since the engine started workers last; a job that is requeued counts attempts from 0 again."""
    lives: dict[int, list[Event]] = {}  # of each rank, since it was started last
    for event in seen:
        if isinstance(event, Start):
            lives[event.rank] = []
        lives.setdefault(event.rank, []).append(event)
    newest = max((life[0] for life in lives.values()), key=lambda event: event.time, default=None)
    return [event for event in seen if newest and event.attempt == newest.attempt and event in lives[event.rank]]


def finished(seen: Sequence[Event]) -> bool:
    """Whether all workers that were started ended with exit status 0."""
    ended = {event.rank: event for event in seen if isinstance(event, End)}
    return all(event.rank in ended for event in seen) and all(event.status == 0 for event in ended.values())


def stopped_well(seen: Sequence[Event]) -> bool:
    """Whether all workers that were started ended in time after they had been asked to."""
    ended = {event.rank: event for event in seen if isinstance(event, End)}
    started = {event.rank for event in seen if isinstance(event, Start)}
    well = (0, 143, 130, -signal.SIGTERM, -signal.SIGINT)
    return started == set(ended) and all(event.status in well for event in ended.values())


def failure(run_dir: Path, seen: Sequence[Event], status: int, seconds: float, engine_log: str) -> str:
    """Returns the report of a run that died.

    Args:
        run_dir: Where the logs are.
        seen: The events of the last attempt.
        status: The engine's exit status.
        seconds: How long the run took.
        engine_log: The name of the engine's own log.
    """
    lines = [f"distopt: the run failed after {timedelta(seconds=round(seconds))} (exit status {status} of the engine)."]
    ends = {event.rank: event for event in seen if isinstance(event, End)}
    silent = [event for event in seen if isinstance(event, Start) and event.rank not in ends]
    told = {rank: match for rank in ends if (match := _TOLD.search("\n".join(last_attempt_lines(run_dir, rank))))}
    source = next((int(match["rank"]) for match in told.values() if int(match["rank"]) in ends), None)
    # One that told the others may have been ended by the engine while it was still printing its traceback.
    culprits = [end for rank, end in ends.items() if rank == source or (end.failed and rank not in told)]
    culprits.sort(key=lambda end: (end.rank != source, bool(_BEREFT.search(last_line(run_dir, end.rank))), end.time))
    if culprits:
        first = culprits[0]
        what = next((match["what"] for match in told.values() if int(match["rank"]) == first.rank), "")
        lines.append(f"  {name(first)} died first: it {f'failed at {what}' if what else f'{cause(first)}.'}")
        lines += [f"  After it: {name(end)} {cause(end)}{why(run_dir, end)}." for end in culprits[1:]]
        early = [end for end in ends.values() if end.status == 0 and end.time < first.time]
        if early:
            lines.append(f"  Before it had ended, as if all were done: {', '.join(map(name, early))}.")
    if told:
        lines.append(f"  Told of its error, and ended by that: {', '.join(name(ends[rank]) for rank in sorted(told))}.")
    waiting = [end for end in ends.values() if end.stopped and end not in culprits and end.rank not in told]
    if waiting:
        lines.append(f"  Merely waiting, ended by the engine: {', '.join(map(name, waiting))}.")
    if silent:
        lines.append(f"  Without a word: {', '.join(map(name, silent))}: its host or its guard has gone.")
    if culprits and (text := traceback_of(run_dir, culprits[0].rank)):
        lines += [f"  {log_of(run_dir, culprits[0].rank)} ends with:", *(f"    {line}" for line in text)]
    if not culprits:
        lines += [f"  {run_dir / LOGS / engine_log} ends with:"]
        lines += [f"    {line}" for line in last_lines(run_dir / LOGS / engine_log)]
    lines += [f"  {line[0].upper()}{line[1:]}." for line in [going_on(run_dir)] if line]
    return "\n".join(lines)


def going_on(run_dir: Path) -> str:
    """Says how a run that has ended goes on; nothing for one that keeps its checkpoints elsewhere, or has none."""
    there = any((run_dir / CHECKPOINTS).glob("step-*"))
    return "the same command goes on from the last checkpoint" if there else ""


def why(run_dir: Path, end: End) -> str:
    """Returns the last line of a rank that has ended by an error of its own."""
    line = last_line(run_dir, end.rank) if (end.status or 0) > 0 else ""
    return f" ({line.strip()[:200]})" if line else ""

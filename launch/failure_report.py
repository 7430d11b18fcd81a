"""Who died first, of what, and who was only waiting."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

from distopt.config import checkpoints_of
from distopt.launchers import LOGS
from distopt.run_files import checkpoints_in
from distopt.worker_error import read_error

from .worker.events import STOPPED_STATUSES, End, Event, Start, error_file
from .worker.rank_log import last_attempt_lines, last_line, last_lines, log_of, traceback_of

# One death brings down all ranks within seconds, and the first to end is often not the one to blame: a rank that has
# raised stays until the others have read its error, while a rank whose connection breaks ends at once. So what each
# worker has recorded of its own error comes first (`distopt.worker_error`): when it was raised, and whether it only
# tells of another rank. Of a worker that has recorded nothing, since it was killed or is a script without distopt, the
# log tells: what it reports of another rank, and whether its traceback ends in a closed connection. Ranks with an error
# of their own are sorted by its time; clocks of different hosts may differ. Where no rank has one, the cause is a rank
# that is silent, because its host is lost, or else one that has ended well while others waited for it.

# How distopt reports another rank's error (distopt/reduce/agreement.py and distopt/backends/heartbeat.py).
_REPORTED = re.compile(
    r"rank (?P<rank>\d+)(?: of \d+ failed| failed first,) at (?P<error>step \d+.*?)"
    r"(?:\. Rank \d+ of \d+ stops because of it\.)?$",
    re.MULTILINE,
)

# How a rank that did nothing wrong ends when another one is gone; seen with gloo, NCCL, Horovod and MPI.
_LOST_PEER = re.compile(
    r"Connection (closed by peer|reset by peer|refused)|Broken pipe|[Tt]imed out|HorovodInternalError|"
    r"connectFullMesh|has been shut down|remote process exited|DistNetworkError|DistBackendError"
)

_WAITED_FOR = re.compile(r"failed while waiting for rank (?P<rank>\d+)\b")
_EXITED = re.compile(r"rank (?P<rank>\d+) (?P<how>exited after step \d+ while other ranks were still waiting for it)\.")

_LIBRARY_LINES = 40  # of a log's end, in which the trace of a library's code may stand


def describe_rank(event: Event) -> str:
    """Returns which worker an event is of, and where that ran."""
    return f"rank {event.rank} on {event.host}"


def describe_end(event: Event) -> str:
    """Returns how a worker ended, as the end of a sentence; a signal is named."""
    status = event.status or 0
    if event.out_of_memory:
        return "was killed, out of memory: give the run more memory, or use a smaller batch"
    if status >= 0:
        return f"ended with exit status {status}"
    if -status == signal.SIGKILL:
        return "was killed (SIGKILL): by a user, or out of memory? `dmesg -T | grep -i oom` on its host shows which"
    names = {number.value: number.name for number in signal.Signals}  # without most of the real-time signals
    return f"died of {names.get(-status, f'signal {-status}')} ({signal.strsignal(-status)})"


def quote_last_line(run_dir: Path, end: End) -> str:
    """Returns the last line of a worker that ended by an error, in parentheses; empty where there is none."""
    if end.worker_error is not None:
        line = end.worker_error.text
    else:
        line = last_line(run_dir, end.rank) if (end.status or 0) > 0 else ""
    return f" ({line.strip()[:200]})" if line else ""


def last_attempt(events: Sequence[Event]) -> list[Event]:
    """Returns the events since the workers were started last; a job that is requeued counts attempts from 0 again."""
    by_rank: dict[int, list[Event]] = {}  # each rank's events since it was started last
    for event in events:
        if isinstance(event, Start):
            by_rank[event.rank] = []
        by_rank.setdefault(event.rank, []).append(event)
    newest = max((since[0] for since in by_rank.values()), key=lambda event: event.time, default=None)

    # In an elastic world of fewer ranks than before, some ranks were not started again: their events are of the past.
    return [event for event in events if newest and event.attempt == newest.attempt and event in by_rank[event.rank]]


def all_succeeded(events: Sequence[Event]) -> bool:
    """Returns whether all workers that were started ended with exit status 0."""
    ends = _last_ends(events)
    return all(event.rank in ends for event in events) and all(end.status == 0 for end in ends.values())


def all_stopped(events: Sequence[Event], *, ends_together: bool = False) -> bool:
    """Returns whether all workers that were started ended in time after they had been asked to.

    Args:
        events: Those of the last attempt.
        ends_together: Whether the launcher ends all workers as soon as one has ended without leaving MPI, as one does
            that was asked to stop before it listened. Supervisors that it kills then record no end, and the ends of
            the others tell.
    """
    ends = _last_ends(events)
    started = {event.rank for event in events if isinstance(event, Start)}
    if started != set(ends) and not (ends_together and ends):
        return False
    return all(end.status in STOPPED_STATUSES for end in ends.values())


def describe_failure(
    run_dir: Path, events: Sequence[Event], status: int, seconds: float, launcher_log: str, *, is_final: bool = False
) -> str:
    """Returns the report of a run that died.

    Args:
        run_dir: Where the logs are.
        events: The events of the last attempt.
        status: The launcher's exit status.
        seconds: How long the run took.
        launcher_log: The name of the launcher's own log; empty where it has none.
        is_final: Whether the run was ended because a restart would end in the same error.
    """
    ends = _last_ends(events)
    reports = _reports(run_dir, ends)
    ends |= _unrecorded_ends(run_dir, events, ends, reports)
    blamed = _blame(run_dir, ends, reports)
    silent = [event for event in events if isinstance(event, Start) and event.rank not in ends]
    blames_silent = bool(silent) and all(_is_from_peer(run_dir, end, reports) for end in blamed)
    early = _ended_early(run_dir, ends, blamed, reports)
    # Where a rank has recorded its end, the host is there: the launcher has killed the supervisors of the others.
    if early is not None and not blamed and all(event.host == early.host for event in silent):
        blames_silent = False
    if not blames_silent and early is not None and (blamed or silent):
        blamed = [early, *blamed]
    duration = timedelta(seconds=round(seconds))
    lines = [f"distopt: the run failed after {duration} (exit status {status} of the launcher)."]

    # What other ranks of a host have recorded shows that it is there, so that somebody must look for another reason.
    is_there = all(event.host in {end.host for end in ends.values()} for event in silent)
    gone = "its supervisor was killed, its host is there" if is_there else "its host or supervisor is gone"
    lost = f"No exit status from {_names(silent)}: {gone}."
    if blames_silent:
        lines.append(f"  {lost} The others stopped because of that." if ends else f"  {lost}")
        lines += _after(run_dir, blamed)
    elif blamed:
        lines += _describe_blamed(run_dir, blamed, ends, reports)
    if reports:
        lines.append(f"  Stopped because of this error: {_names(ends[rank] for rank in sorted(reports))}.")
    waiting = [end for end in ends.values() if end.stopped and end not in blamed and end.rank not in reports]
    if waiting:
        lines.append(f"  Only waiting, terminated by the launcher: {_names(waiting)}.")
    if silent and not blames_silent:
        lines.append(f"  {lost}")

    if not blamed and launcher_log:
        lines += _quote(run_dir / LOGS / launcher_log, last_lines(run_dir / LOGS / launcher_log))
    elif blamed and (text := traceback_of(run_dir, blamed[0].rank)):
        lines += _quote(log_of(run_dir, blamed[0].rank), text)
    is_final = is_final or any(end.worker_error is not None and end.worker_error.permanent for end in ends.values())
    if hint := resume_hint(run_dir, is_final=is_final):
        lines.append(f"  {hint[0].upper()}{hint[1:]}.")
    return "\n".join(lines)


def resume_hint(run_dir: Path, *, is_final: bool = False) -> str:
    """Returns how to resume a run that has ended; empty for one without checkpoints, or that keeps them at a URL.

    Args:
        run_dir: The run.
        is_final: Whether it would end in the same error.
    """
    folder = checkpoints_of(run_dir)
    if not isinstance(folder, Path) or not checkpoints_in(folder):
        return ""
    first = "the error would come again: mend it first, then " if is_final else ""
    return f"{first}run the same command again to resume from the last checkpoint"


def _last_ends(events: Sequence[Event]) -> dict[int, End]:
    return {event.rank: event for event in events if isinstance(event, End)}


def _unrecorded_ends(
    run_dir: Path, events: Sequence[Event], ends: dict[int, End], reports: dict[int, re.Match[str]]
) -> dict[int, End]:
    """Returns the ends of workers that failed, as they or others tell, and whose supervisor recorded no end.

    Open MPI's mpirun kills all supervisors within a second of the first one's end, which may be that of a rank that has
    only heard of the error.
    """
    sources = {int(match["rank"]) for match in reports.values()}
    exited = _exits_seen(ends.values())
    unrecorded = {}
    for event in events:
        if not isinstance(event, Start) or event.rank in ends:
            continue
        error = read_error(error_file(run_dir, event.rank, event.pid))
        if error is not None or event.rank in sources or event.rank in exited:
            time = event.time if error is None else error.time
            raised = None if error is None else asdict(error)
            status = int(error is not None or event.rank in sources)
            unrecorded[event.rank] = End(event.rank, event.attempt, event.host, event.pid, time, status, raised=raised)
    return unrecorded


def _reports(run_dir: Path, ends: Iterable[int]) -> dict[int, re.Match[str]]:
    """What ranks report of the error of another rank, by the reporting rank."""
    reports = {}
    for rank in ends:
        match = _REPORTED.search("\n".join(last_attempt_lines(run_dir, rank)))
        if match and int(match["rank"]) != rank:
            reports[rank] = match
    return reports


def _blame(run_dir: Path, ends: dict[int, End], reports: dict[int, re.Match[str]]) -> list[End]:
    """The workers that ended by an error, the one to blame for the others first."""
    sources = {int(match["rank"]) for match in reports.values()} & set(ends)
    # The launcher may have ended the source while that was still printing its traceback; it has failed all the same.
    blamed = [
        end
        for rank, end in ends.items()
        if rank in sources or (end.failed and rank not in reports) or (end.status and _raised_itself(end))
    ]

    def order(end: End) -> tuple[object, ...]:
        from_peer = _is_from_peer(run_dir, end, reports)
        return from_peer, end.worker_error is None and end.rank not in sources, _time_of(end)

    return sorted(blamed, key=order)


def _raised_itself(end: End) -> bool:
    return end.worker_error is not None and not end.worker_error.from_peer


def _is_from_peer(run_dir: Path, end: End, reports: dict[int, re.Match[str]]) -> bool:
    """Returns whether a worker ended because of another one, as far as it has recorded or printed."""
    if end.worker_error is not None:
        return end.worker_error.from_peer
    if end.rank in {int(match["rank"]) for match in reports.values()}:
        return False
    # A trace of a library's C++ code is no reason to quote, but without one of Python's it tells of a lost connection.
    text = last_line(run_dir, end.rank)
    lines = last_attempt_lines(run_dir, end.rank)
    if not any("Traceback" in line for line in lines):
        text = "\n".join([text, *lines[-_LIBRARY_LINES:]])
    return end.rank in reports or bool(_LOST_PEER.search(text))


def _time_of(end: End) -> float:
    return end.time if end.worker_error is None else end.worker_error.time


def _ended_early(
    run_dir: Path, ends: dict[int, End], blamed: Sequence[End], reports: dict[int, re.Match[str]]
) -> End | None:
    """The rank that ended with status 0 while others waited for it, where none of them has an error of its own.

    The launcher may have ended it while it was leaving; then it is the one that the others name.
    """
    if not all(_is_from_peer(run_dir, end, reports) for end in blamed):
        return None
    for rank in _exits_seen(blamed):
        if rank in ends and ends[rank] not in blamed:
            return ends[rank]
    # Its connections close before its supervisor sees it end, so the others' errors may be earlier than its end.
    for rank in _waited_for(blamed):
        if rank in ends and ends[rank].status == 0:
            return ends[rank]
    first = min(map(_time_of, blamed), default=float("inf"))
    return min((end for end in ends.values() if end.status == 0 and end.time <= first), key=_time_of, default=None)


def _exits_seen(ends: Iterable[End]) -> dict[int, str]:
    """What errors tell of ranks that exited while others waited for them, by the rank."""
    matches = (_EXITED.search(end.worker_error.text) for end in ends if end.worker_error is not None)
    return {int(match["rank"]): match["how"] for match in matches if match}


def _waited_for(ends: Iterable[End]) -> list[int]:
    """The ranks that errors name as those that were waited for."""
    matches = (_WAITED_FOR.search(end.worker_error.text) for end in ends if end.worker_error is not None)
    return [int(match["rank"]) for match in matches if match]


def _describe_blamed(
    run_dir: Path, blamed: Sequence[End], ends: dict[int, End], reports: dict[int, re.Match[str]]
) -> list[str]:
    first = blamed[0]
    error = next((match["error"] for match in reports.values() if int(match["rank"]) == first.rank), "")
    how = _describe_death(first, error, _exits_seen(blamed[1:]).get(first.rank, ""))
    lines = [f"  {describe_rank(first)} died first: it {how}"]
    lines += _after(run_dir, blamed[1:])
    earlier = [end for end in ends.values() if end.status == 0 and end is not first and end.time < _time_of(first)]
    if earlier:
        lines.append(f"  Already finished successfully before that: {_names(earlier)}.")
    return lines


def _after(run_dir: Path, ends: Iterable[End]) -> list[str]:
    return [f"  After it: {describe_rank(end)} {describe_end(end)}{quote_last_line(run_dir, end)}." for end in ends]


def _describe_death(end: End, reported: str, exit_seen: str) -> str:
    """Returns how the worker to blame died, as the end of a sentence; what others report of it names the step."""
    if reported:
        return f"failed at {reported}"
    if exit_seen:
        return f"{exit_seen}."
    if end.worker_error is not None:
        location = f" at {end.worker_error.location}" if end.worker_error.location else ""
        return f"failed{location}: {end.worker_error.text}"
    if end.status == 0:
        return "ended with exit status 0 while other ranks were still waiting for it."
    return f"{describe_end(end)}."


def _names(events: Iterable[Event]) -> str:
    return ", ".join(map(describe_rank, events))


def _quote(path: Path, lines: Sequence[str]) -> list[str]:
    return [f"  {path} ends with:", *(f"    {line}" for line in lines)]

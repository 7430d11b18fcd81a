"""What supervisors record is read back, once, in the order of time."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from distopt.launch.worker import events
from distopt.launch.worker.events import End, Reader, Start, Unwritable
from tests.control_groups import control_group
from tests.small_disks import fill, small_disk


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "logs").mkdir()
    return tmp_path


def test_events_of_all_ranks_come_once_in_the_order_of_time(run_dir):
    reader = Reader(run_dir)
    recorded = [Start(1, 0, "b", 2, 1.0), Start(0, 0, "a", 1, 2.0), End(1, 0, "b", 2, 3.0, -9, out_of_memory=True)]
    for event in reversed(recorded):
        events.append(run_dir, event)
    assert reader.new() == recorded and reader.new() == []
    later = End(0, 0, "a", 1, 4.0, 0, stopped=True)
    events.append(run_dir, later)
    assert reader.new() == [later]
    assert reader.seen == [*recorded, later]


def test_reader_begins_where_the_files_end_unless_told_otherwise(run_dir):
    events.append(run_dir, Start(0, 0, "a", 1, 1.0))
    assert Reader(run_dir).new() == []
    assert Reader(run_dir, from_start=True).new() == [Start(0, 0, "a", 1, 1.0)]


def test_line_that_is_still_being_written_is_read_when_it_is_whole(run_dir):
    reader = Reader(run_dir)
    events.append(run_dir, Start(0, 0, "a", 1, 1.0))
    path = run_dir / "logs/rank-0.jsonl"
    line = path.read_text()
    path.write_text(line + line[:20])
    assert len(reader.new()) == 1
    path.write_text(line + line)
    assert len(reader.new()) == 1


def test_recorded_line_is_what_other_programs_read(run_dir):
    events.append(run_dir, End(1, 2, "host", 7, 3.5, 1))
    assert json.loads((run_dir / "logs/rank-1.jsonl").read_text()) == {
        "event": "end", "rank": 1, "attempt": 2, "host": "host", "pid": 7, "time": 3.5, "status": 1,
        "stopped": False, "out_of_memory": False, "raised": None,
    }  # fmt: skip


def test_line_that_a_writer_was_killed_over_and_those_of_other_versions_are_left_out(run_dir):
    reader = Reader(run_dir)
    path = run_dir / "logs/rank-0.jsonl"
    path.write_bytes(b'{"event": "later than today"}\n[]\n\xff\n{"event": "start", "ra')
    recorded = [
        Start(0, 0, "a", 1, 1.0),
        Unwritable(0, 0, "a", 1, 1.5, path="log", error="why"),
        End(0, 0, "a", 1, 2.0, 0),
    ]
    for event in recorded:
        events.append(run_dir, event)
    assert reader.new() == recorded


def test_end_is_recorded_though_the_disk_is_full_by_then(tmp_path):
    with small_disk(tmp_path / "disk", 64) as folder:
        (folder / "logs").mkdir()
        reader = Reader(folder)
        recorded = [Start(0, 0, "a", 1, 1.0), End(0, 0, "a", 1, 2.0, 0)]
        path = folder / "logs/rank-0.jsonl"
        path.write_text("\n" * 4090)  # so that the end does not fit into a page that the file has
        events.append(folder, recorded[0])
        fill(folder)
        events.append(folder, recorded[1])
        assert reader.new() == recorded
        with pytest.raises(OSError, match="No space left"):
            for _ in range(100):
                events.append(folder, recorded[1])
        assert path.read_bytes().endswith(b"}\n")


def test_worker_that_was_asked_to_stop_has_not_failed():
    assert End(0, 0, "a", 1, 1.0, 1).failed and End(0, 0, "a", 1, 1.0, -9).failed
    assert not End(0, 0, "a", 1, 1.0, 0).failed
    assert not End(0, 0, "a", 1, 1.0, 143, stopped=True).failed


def test_kernel_that_kills_for_want_of_memory_is_counted():
    limit = str(64 << 20)
    code = (
        "import subprocess, sys; from distopt.launch.worker.events import oom_kills; before = oom_kills()\n"
        "eat = 'eaten = []\\nwhile True: eaten.append(bytearray(1 << 20))'\n"
        "status = subprocess.run([sys.executable, '-c', eat]).returncode; print(status, oom_kills() - before)"
    )
    with control_group("memory", {"memory.limit_in_bytes": limit}, {"memory.max": limit}) as group:
        shell = ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh", sys.executable, "-c", code]
        done = subprocess.run(shell, capture_output=True, text=True, timeout=60, env=os.environ)
    assert done.stdout == "-9 1\n", done.stderr

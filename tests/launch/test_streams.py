"""Standard streams that were closed, lost their reader or cannot be written do not end a command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distopt.launch.worker.streams import BestEffort

PRINTING = """
import sys
from distopt.launch.worker.streams import best_effort, has_lost_its_reader, open_standard_streams
open_standard_streams()
with best_effort():
    for _ in range(1000):
        print("a line of output")
    print("a folder: \u00fc", file=sys.stderr)
    lost = has_lost_its_reader(sys.stdout)
sys.exit(40 + lost)
"""


def printing(stdout: int, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", PRINTING], stdout=stdout, stderr=subprocess.PIPE, env=env, timeout=60, check=False
    )


def test_output_on_a_full_disk_is_left_out_and_the_exit_status_is_kept():
    with Path("/dev/full").open("wb") as full:
        done = printing(full.fileno())
    assert (done.returncode, done.stderr.decode()) == (40, "a folder: \u00fc\n")


def test_reader_that_has_gone_is_noticed():
    reading_end, writing_end = os.pipe()
    os.close(reading_end)
    done = printing(writing_end)
    os.close(writing_end)
    assert (done.returncode, done.stderr.decode()) == (41, "a folder: \u00fc\n")


def test_letters_that_the_encoding_lacks_are_escaped():
    done = printing(subprocess.DEVNULL, os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (40, b"a folder: \\xfc\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_stream_that_was_closed_is_opened_so_that_no_file_takes_its_number(closed):
    code = (
        "import os, sys; from distopt.launch.worker.streams import open_standard_streams; open_standard_streams()\n"
        "file = open(os.devnull, 'w'); print('out'); print('err', file=sys.stderr); sys.exit(40 + (file.fileno() > 2))"
    )
    done = subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, code], timeout=60, check=False)
    assert done.returncode == 41


def test_what_a_full_pipe_takes_in_parts_arrives_whole():
    reading_end, writing_end = os.pipe()
    data = bytes(range(256)) * 4000
    reader = subprocess.Popen(["sha256sum"], stdin=reading_end, stdout=subprocess.PIPE, text=True)
    os.close(reading_end)
    assert BestEffort(writing_end).write(data) == len(data)
    os.close(writing_end)
    expected = subprocess.run(["sha256sum"], input=data, capture_output=True, check=True).stdout.decode()
    assert reader.communicate(timeout=60)[0] == expected

"""What is quoted of a rank's log: the last attempt's traceback, however long the log is."""

from __future__ import annotations

import re

import pytest

from distopt.launch.worker import rank_log
from tests.small_disks import fill, small_disk

TRACEBACK = ["Traceback (most recent call last):", '  File "train.py", line 3, in <module>', "ValueError: no"]


@pytest.fixture
def write(tmp_path):
    (tmp_path / "logs").mkdir()

    def log(*attempts: list[str]) -> None:
        headers = [rank_log.header(0, 2, number) for number in range(len(attempts))]
        texts = ["".join(f"{line}\n" for line in lines).encode() for lines in attempts]
        data = b"".join(header + text for header, text in zip(headers, texts, strict=True))
        rank_log.log_of(tmp_path, 0).write_bytes(data)

    return log


def test_header_is_recognised_and_lines_of_dashes_are_none(write, tmp_path):
    assert rank_log.HEADER.match(rank_log.header(3, 4, 2))
    assert not rank_log.HEADER.match(b"--- 2026-01-01 rank 0 of 2")
    write(["--- a heading of the script", "step 1"])
    assert rank_log.last_attempt_lines(tmp_path, 0) == ["--- a heading of the script", "step 1"]


def test_last_traceback_of_the_last_attempt_is_quoted(write, tmp_path):
    other = [*TRACEBACK[:-1], "KeyError: 'a'"]
    write(other, ["step 1", *other, "During handling of the above exception, another exception occurred:", *TRACEBACK])
    assert rank_log.traceback_of(tmp_path, 0) == TRACEBACK
    assert rank_log.last_line(tmp_path, 0) == "ValueError: no"


def test_long_tracebacks_and_logs_are_cut_at_their_beginning(write, tmp_path):
    frames = [f"  frame {number}" for number in range(100)]
    write([*(["x" * 1000] * 1000), TRACEBACK[0], *frames, "RecursionError: deep"])
    quoted = rank_log.traceback_of(tmp_path, 0)
    assert len(quoted) == rank_log.MAX_TRACEBACK_LINES and quoted[-1] == "RecursionError: deep"


def test_log_without_a_traceback_gives_its_last_lines_and_a_missing_one_none(write, tmp_path):
    assert rank_log.traceback_of(tmp_path, 0) == [] and rank_log.last_line(tmp_path, 0) == ""
    assert rank_log.read_log(tmp_path, 0) == b""
    write([f"step {number}" for number in range(50)] + [""])
    assert rank_log.traceback_of(tmp_path, 0)[-2:] == ["step 49", ""]
    assert rank_log.last_line(tmp_path, 0) == "step 49"
    assert rank_log.read_log(tmp_path, 0, offset=len(rank_log.header(0, 2, 0))).startswith(b"step 0\n")


def test_reason_that_a_rank_printed_is_quoted_and_not_the_trace_of_torch_s_code_behind_it(write, tmp_path):
    reason = "distopt: rank 1 of 2: data: task: rows() is 1,000 on rank 0 and 1,005 on rank 1"
    trace = [
        "[W1126 06:27:41.968654732 TCPStore.cpp:125] [c10d] recvValue failed: Connection reset by peer",
        "Exception raised from recvBytes at torch/csrc/distributed/c10d/Utils.hpp:682 (most recent call first):",
        "frame #0: c10::Error::Error(c10::SourceLocation, std::string) + 0x80 (0x7f8e21390022 in libc10.so)",
        "<omitting python frames>",
        "frame #18: <unknown function> + 0x1098ec (0x7f8e281278ec in /lib/x86_64-linux-gnu/libc.so.6)",
        "",
    ]
    write(["step 1", reason, *trace])
    assert rank_log.last_line(tmp_path, 0) == reason
    write(trace)  # nothing else was printed
    assert rank_log.last_line(tmp_path, 0) == ""
    assert "frame #18" in "\n".join(rank_log.traceback_of(tmp_path, 0))


def test_log_on_a_full_disk_is_told_once_and_continues_when_there_is_room(tmp_path):
    reported = []
    with (
        small_disk(tmp_path / "disk", 64) as folder,
        rank_log.RankLog(folder, 0, lambda *what: reported.append(what)) as log,
    ):
        log.write(b"a first line\n")
        filler = fill(folder)
        for _ in range(9):
            log.write(b"x" * 1000 + b"\n")
        ((path, error),) = reported
        assert (path, error.strerror) == (rank_log.log_of(folder, 0), "No space left on device")
        filler.unlink()
        log.write(b"a last line\n")
        text = path.read_text()
    assert text.startswith("a first line\n") and text.endswith("\na last line\n")
    missing = re.search(r"--- (\d+) bytes are missing here: .*No space left", text)
    assert missing and int(missing[1]) + text.count("x") + text[: missing.start()].count("\n") >= 9 * 1000
    assert len(reported) == 1


def test_log_that_cannot_be_opened_is_told_and_nothing_is_written(tmp_path):
    (tmp_path / "logs").write_text("a file where a folder should be")
    reported = []
    with rank_log.RankLog(tmp_path, 0, lambda *what: reported.append(what)) as log:
        log.write(b"a line\n")
    assert [path for path, _ in reported] == [rank_log.log_of(tmp_path, 0)]

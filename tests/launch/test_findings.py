"""What a check reports is one line where it can be, and only failures keep a run from starting."""

from __future__ import annotations

import pytest

from distopt.launch.findings import Finding, failures


@pytest.mark.parametrize(
    ("finding", "text"),
    [
        (
            Finding("launch.port", "80 is in use", "set launch.port=null"),
            "launch.port: 80 is in use; set launch.port=null",
        ),
        (Finding("task", "tasks.py:3: invalid syntax"), "task: tasks.py:3: invalid syntax"),
        (
            Finding("run_dir", "differs:\n    seed: 1 there", "undo it"),
            "run_dir: differs:\n    seed: 1 there\n  undo it",
        ),
    ],
    ids=["with its fix", "without a fix", "of several lines"],
)
def test_finding_reads_as_subject_message_and_fix(finding: Finding, text: str) -> None:
    assert str(finding) == text


def test_finding_keeps_a_run_from_starting_unless_it_says_otherwise() -> None:
    plain = Finding("host-2", "no answer")
    warning = Finding("host-2", "its clock is 3 s late", severity="warning")
    good = Finding("torch", "2.13.0", severity="ok")
    assert failures(iter([good, warning, plain])) == [plain]
    assert failures([good, warning]) == []

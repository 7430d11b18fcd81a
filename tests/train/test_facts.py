"""What `run.json` says of a run, and that a run does not depend on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from distopt.backends.single import Single
from distopt.config import parse_config
from distopt.run_files import read_facts
from distopt.train.facts import Facts
from tests.small_disks import fill, small_disk


def test_full_disk_is_told_once_and_facts_are_written_when_there_is_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", 64) as folder:
        facts = Facts(parse_config(f"{{name: x, task: a:B, run_dir: {folder}}}"), Single(), 0)
        filler = fill(folder)
        for outcome in ("first", "second"):
            facts.note(outcome=outcome)
        assert read_facts(folder)["outcome"] is None
        filler.unlink()
        facts.note(outcome="third")
        assert read_facts(folder)["outcome"] == "third"
    message = f"distopt: {tmp_path}/disk/run.json cannot be written: No space left on device; training continues\n"
    assert capsys.readouterr().err == message

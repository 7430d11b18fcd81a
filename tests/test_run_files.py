"""What is read of a run's directory is what was written there, whatever else lies in it or is damaged."""

from __future__ import annotations

import json

import pytest

from distopt.run_files import checkpoints_in, read_facts, read_metrics, step_of


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step-00000000", 0),
        ("step-00000123", 123),
        ("step-123456789", 123456789),
        ("step-00000123-5f0c1a2b", 123),
        ("step-123", None),
        (".tmp-00000123-5f0c1a2b", None),
        (".del-step-00000123-5f0c1a2b", None),
        ("step-00000123-", None),
        ("step-00000123 ", None),
        ("my-step-00000123", None),
    ],
)
def test_step_is_that_of_a_checkpoints_name_alone(name, step):
    assert step_of(name) == step


def test_checkpoints_are_those_that_were_committed_in_the_order_of_steps(tmp_path):
    names = ["step-00000020", "step-100000000", "step-99999999", "step-00000030", ".tmp-00000040-5f0c1a2b", "step-5"]
    for name in names:
        (tmp_path / name).mkdir()
        if name != "step-00000030":
            (tmp_path / name / "manifest.json").touch()
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000020", "step-99999999", "step-100000000"]
    assert checkpoints_in(tmp_path / "missing") == []


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"null", b'"text"', b"\xff"])
def test_facts_that_are_damaged_or_missing_are_none(text, tmp_path):
    assert read_facts(tmp_path) == {}
    (tmp_path / "run.json").write_bytes(text)
    assert read_facts(tmp_path) == {}


def test_rows_are_whole_ones_however_little_is_read_of_the_file(tmp_path):
    assert read_metrics(tmp_path) == []
    rows = [{"step": step, "elbo": -1.5 * step} for step in range(1, 9)]
    lines = [json.dumps(row).encode() for row in rows]
    damaged = [*lines[:4], b"nonsense", b"[1]", b'{"elbo": 1}', b"\xff\xfe", *lines[4:], b'{"step": 9, "el']
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join(damaged))
    assert read_metrics(tmp_path) == rows
    for num_bytes in range(path.stat().st_size + 2):
        last = read_metrics(tmp_path, num_bytes)
        assert last == rows[len(rows) - len(last) :]
    assert last == rows

"""The manifest: every byte of it counts, and no value in it can do harm."""

from __future__ import annotations

import json

import pytest

from distopt.checkpoint import CorruptCheckpointError, UnreadableCheckpointError
from distopt.checkpoint.manifest import Manifest, seal
from distopt.run_files import MANIFEST
from tests.checkpoint.damage import LAST, check_refused, restored_step


def test_every_byte_of_the_manifest_counts(template):
    raw = (template / LAST / MANIFEST).read_bytes()
    for offset in range(len(raw)):
        for changed in (raw[:offset], raw[:offset] + bytes([raw[offset] ^ 1]) + raw[offset + 1 :]):
            with pytest.raises(CorruptCheckpointError):
                Manifest.decode(changed, "here")


@pytest.mark.parametrize(
    "name", ["../escape.json.gz", "/etc/passwd", "a\0b", ".hidden", "", "x" * 300, "sub/file", "manifest.json", "-rf"]
)
def test_manifest_that_names_a_file_elsewhere_is_refused(name, root, caplog):
    body = json.loads((root / LAST / MANIFEST).read_bytes())["body"]
    body["files"][name] = {"size": 0, "chunks": []}
    (root / LAST / MANIFEST).write_bytes(seal(body))
    check_refused(root, caplog)


@pytest.mark.parametrize(
    "change",
    [
        {"step": "2"}, {"step": -1}, {"world_size": 0}, {"generation": None},
        {"attempt": "../x"},
        {"files": []}, {"about": None}, {"files": {"a.json.gz": {"size": 1, "chunks": []}}},
        {"files": {"a.json.gz": {"size": -1, "chunks": []}}}, {"files": {"a": {"size": 1, "chunks": ["zz"]}}},
        {"surplus": 1}, {"files": {"a": {"size": True, "chunks": ["0" * 64]}}},
        {"files": {f"f{index}": {"size": 0, "chunks": []} for index in range(20_001)}},
    ],
    ids=lambda change: str(change)[:40],
)  # fmt: skip
def test_manifest_with_impossible_values_is_refused(change, root, caplog):
    body = json.loads((root / LAST / MANIFEST).read_bytes())["body"]
    (root / LAST / MANIFEST).write_bytes(seal(body | change))
    check_refused(root, caplog)


@pytest.mark.parametrize("change", [{"format": 1}, {"format": 5}, {"digest": "sha256"}], ids=str)
def test_checkpoint_of_another_version_of_distopt_is_no_damage_and_stays(change, root, caplog):
    body = json.loads((root / LAST / MANIFEST).read_bytes())["body"]
    (root / LAST / MANIFEST).write_bytes(seal(body | change))
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(UnreadableCheckpointError, match="Another version of distopt has written it"):
        restored_step(root, caplog)
    assert {path: path.read_bytes() for path in before} == before

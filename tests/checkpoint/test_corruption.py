"""Bytes that are not those that were written are noticed, named and never loaded; the checkpoint before is taken."""

from __future__ import annotations

import gzip
import json
import logging
import os
import pickle
import random
import re
import shutil
import zlib
from pathlib import Path

import pyro
import pytest
import torch

from distopt.backends.single import Single
from distopt.checkpoint import Checkpointer, CheckpointError, CorruptCheckpointError
from distopt.checkpoint import reader as reader_module
from distopt.checkpoint.chunks import by_chunk, chunk_digest
from distopt.checkpoint.manifest import CHUNK_BYTES, MANIFEST, FileRecord, Manifest, seal
from distopt.checkpoint.reader import verify
from distopt.checkpoint.statefile import StateReader
from distopt.checkpoint.storage.base import open_storage

LAST, BEFORE = "step-00000002", "step-00000001"


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Two checkpoints of a module with buffers, of parameters large and small, and an optimizer."""
    root = tmp_path_factory.mktemp("template")
    with Checkpointer(root, {"norm": torch.nn.BatchNorm1d(3)}, backend=Single()) as checkpointer:
        for step in (1, 2):
            pyro.clear_param_store()
            torch.rand(1)  # so that the noise differs
            pyro.param("small", torch.full((3,), float(step)))
            pyro.param("large", torch.full((300, 70), float(step)), constraint=torch.distributions.constraints.positive)
            checkpointer.save(step)
            checkpointer.wait()
    return root


@pytest.fixture
def root(template, tmp_path):
    shutil.copytree(template, tmp_path / "run")
    return tmp_path / "run"


def restored_step(root, caplog):
    """Restores, checks that the numbers are those of the step, and returns the step and what was logged."""
    caplog.clear()
    pyro.clear_param_store()
    with (
        caplog.at_level(logging.WARNING),
        Checkpointer(root, {"norm": torch.nn.BatchNorm1d(3)}, backend=Single()) as checkpointer,
    ):
        restored = checkpointer.restore()
    for name in ("small", "large"):
        assert torch.allclose(pyro.param(name), torch.tensor(float(restored.step)))
    return restored.step, caplog.text


def same_in_both(root, name):
    return (root / LAST / name).read_bytes() == (root / BEFORE / name).read_bytes()


def all_files(template):
    return sorted(path.name for path in (template / LAST).iterdir())


def test_single_bit_when_flipped_anywhere_is_noticed_and_the_file_named(root):
    generator = random.Random(1)
    files = sorted((root / LAST).iterdir())
    assert len(files) == 6
    weights = [path.stat().st_size for path in files]
    storage = open_storage(root)
    for path in generator.choices(files, weights, k=300) + generator.choices(files, k=200):
        raw = bytearray(path.read_bytes())
        offset, bit = generator.randrange(len(raw)), generator.randrange(8)
        raw[offset] ^= 1 << bit
        path.write_bytes(raw)
        with pytest.raises(CorruptCheckpointError, match=path.name):
            verify(storage, LAST)
        raw[offset] ^= 1 << bit
        path.write_bytes(raw)
    verify(storage, LAST)


def test_every_byte_of_the_manifest_counts(template):
    raw = (template / LAST / MANIFEST).read_bytes()
    for offset in range(len(raw)):
        for changed in (raw[:offset], raw[:offset] + bytes([raw[offset] ^ 1]) + raw[offset + 1 :]):
            with pytest.raises(CorruptCheckpointError):
                Manifest.decode(changed, "here")


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 16
    path.write_bytes(raw)


def truncate_by_one(path):
    os.truncate(path, path.stat().st_size - 1)


def truncate_to_a_page(path):
    os.truncate(path, path.stat().st_size // 4096 * 4096 if path.stat().st_size > 4096 else 1)


def empty(path):
    os.truncate(path, 0)


def swap_with_the_other_step(path):
    shutil.copy(path.parent.parent / BEFORE / path.name, path)


def append(path):
    with path.open("ab") as file:
        file.write(b"\0")


def turn_into_a_link(path):
    moved = path.parent.parent / f"moved-{path.name}"
    path.rename(moved)
    path.symlink_to(moved)


def turn_into_a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def replace_by_a_pickle(path):
    path.write_bytes(pickle.dumps(Canary(str(path.parent.parent / "canary"))))


DAMAGES = (
    flip, truncate_by_one, truncate_to_a_page, empty, swap_with_the_other_step, append, turn_into_a_link,
    turn_into_a_pipe, replace_by_a_pickle, os.unlink,
)  # fmt: skip


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_any_file_when_damaged_is_named_and_the_checkpoint_before_is_restored(damage, template, root, caplog):
    for name in all_files(template):
        if damage is swap_with_the_other_step and same_in_both(root, name):
            continue
        damage(root / LAST / name)
        step, log = restored_step(root, caplog)
        assert step == 1
        assert name in log and "Falling back" in log
        assert not (root / "canary").exists()
        shutil.rmtree(root)
        shutil.copytree(template, root)
    assert restored_step(root, caplog) == (2, "")


def test_file_when_cut_off_at_any_page_is_noticed_and_named(template, root):
    storage, cuts = open_storage(root), 0
    for name in all_files(template):
        path = root / LAST / name
        raw = path.read_bytes()
        for size in range(0, len(raw), 4096):
            os.truncate(path, size)
            with pytest.raises(CorruptCheckpointError, match=name):
                verify(storage, LAST)
            cuts += 1
        path.write_bytes(raw)
    assert cuts >= 25
    verify(storage, LAST)


def test_file_of_another_step_is_named_with_both_steps(root):
    shutil.copy(root / BEFORE / "replicated.safetensors", root / LAST / "replicated.safetensors")
    with pytest.raises(CorruptCheckpointError, match="the file is of step 1, the manifest of step 2"):
        verify(open_storage(root), LAST)


def test_folder_under_another_steps_name_and_surplus_file_are_refused(root, caplog):
    (root / LAST / "rank-00007.json.gz").write_bytes(b"")
    step, log = restored_step(root, caplog)
    assert step == 1 and "rank-00007.json.gz is not in its manifest" in log
    shutil.rmtree(root / LAST)
    shutil.copytree(root / BEFORE, root / "step-00000009")
    step, log = restored_step(root, caplog)
    assert step == 1 and "is of step 1, the folder's name says 9" in log


def test_run_when_all_checkpoints_are_bad_does_not_start_from_zero(root):
    for folder in (LAST, BEFORE):
        flip(root / folder / "replicated.json.gz")
    with Checkpointer(root, backend=Single()) as checkpointer:
        with pytest.raises(CheckpointError, match="none of the 2 checkpoints can be loaded"):
            checkpointer.restore()
        with pytest.raises(CheckpointError, match="none of the 1"):
            checkpointer.restore(2)


def test_harness_when_digests_are_not_compared_finds_it(root, monkeypatch):
    flip(root / LAST / "replicated.safetensors")
    monkeypatch.setattr(reader_module.xxhash, "xxh3_128", AnyDigest)
    verify(open_storage(root), LAST)  # the tests above would fail: nothing is raised


class AnyDigest:
    def update(self, data):
        pass

    def hexdigest(self):
        return self

    def __ne__(self, other):
        return False


def forge(root, name, raw):
    """Replaces a file and gives the manifest its right digests, as an attacker would."""
    (root / LAST / name).write_bytes(raw)
    body = json.loads((root / LAST / MANIFEST).read_bytes())["body"]
    chunks = tuple(chunk_digest(chunk) for _, chunk in by_chunk([memoryview(raw)]))
    body["files"][name] = FileRecord(len(raw), chunks).as_json()
    (root / LAST / MANIFEST).write_bytes(seal(body))


def header(document, data=b""):
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(start, stop, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def bomb():
    """A gigabyte of blanks in one megabyte."""
    packer = zlib.compressobj(9, wbits=31)
    return b"".join(packer.compress(bytes([32]) * (1 << 24)) for _ in range(64)) + packer.flush()


FORGED_TENSORS = {
    "header of 100 MB": (100 << 20).to_bytes(8, "little") + b"{}",
    "header longer than the file": (1 << 62).to_bytes(8, "little") + b"{}",
    "overlap": header({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, bytes(12)),
    "gap": header({"a": tensor(0, 4, [1]), "b": tensor(8, 12, [1])}, bytes(12)),
    "too little data": header({"a": tensor(0, 400, [100])}, bytes(4)),
    "too much data": header({"a": tensor(0, 4, [1])}, bytes(400)),
    "huge shape": header({"a": tensor(0, 4, [1 << 40, 1 << 40])}, bytes(4)),
    "negative shape": header({"a": tensor(0, 4, [-1])}, bytes(4)),
    "unknown dtype": header({"a": tensor(0, 4, [1], "OBJ")}, bytes(4)),
    "same name twice": header(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":1}'),
    "nested too deep": header(b"[" * 200_000),
    "a list": header([]),
    "not JSON": header(b"\x80\x04."),
    "a million names": header(
        b"{" + b",".join(b'"%d":0' % index for index in range(1_000_000)) + b"}",
    ),
    "other tensors than the JSON says": header({"a": tensor(0, 4, [1])}, bytes(4)),
    "a pickle": pickle.dumps(Canary("/nowhere/canary")),
}
FORGED_JSON = {
    "not gzip": b"hello",
    "a pickle": pickle.dumps(Canary("/nowhere/canary")),
    "a pickle inside": gzip.compress(pickle.dumps(Canary("/nowhere/canary"))),
    "bomb": bomb(),
    "deep": gzip.compress(b"[" * 200_000),
    "cut short": gzip.compress(b"{}" * 1000)[:-9],
    "unknown tag": gzip.compress(b'{"$import": "os.system"}'),
    "tensor that is not there": gzip.compress(b'{"a": {"$t": "float32 3", "in": "../../etc/passwd"}}'),
    "tensor of a strange shape": gzip.compress(b'{"a": {"$t": "float32 -3,-3"}}'),
    "tensor of a strange dtype": gzip.compress(b'{"a": {"$t": "object 3"}}'),
}


@pytest.mark.parametrize("forged", FORGED_TENSORS)
def test_forged_tensors_are_refused_without_reading_more_than_there_is(forged, root, caplog):
    forge(root, "replicated.safetensors", FORGED_TENSORS[forged])
    check_refused(root, caplog)


@pytest.mark.parametrize("forged", FORGED_JSON)
def test_forged_json_is_refused_without_unpacking_more_than_there_is(forged, root, caplog):
    forge(root, "replicated.json.gz", FORGED_JSON[forged])
    check_refused(root, caplog)


def check_refused(root, caplog):
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark of memory starts anew
    before = peak_kib()
    step, log = restored_step(root, caplog)
    assert step == 1 and "Falling back" in log
    assert peak_kib() - before < 200 << 10


def peak_kib():
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


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
        {"format": 1}, {"digest": "sha256"}, {"step": "2"}, {"step": -1}, {"world_size": 0}, {"generation": None},
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


def test_rows_when_read_alone_are_checked_and_equal_those_read_with_the_rest(tmp_path):
    from tests.checkpoint.states import commit_state

    rows = 3 * CHUNK_BYTES // 400
    state = {"large": torch.randn(rows, 100), "small": torch.arange(12).reshape(6, 2)}
    storage, folder = commit_state(tmp_path, state)
    manifest = verify(storage, folder)
    wanted = {"large": (rows // 2, rows // 2 + 7), "small": (2, 5)}
    found = read_rows(storage, folder, manifest, wanted)
    for name, (start, stop) in wanted.items():
        assert torch.equal(found[name], state[name][start:stop])
    path = tmp_path / folder / "replicated.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1  # in a chunk that the rows of "large" do not touch
    path.write_bytes(raw)
    assert torch.equal(read_rows(storage, folder, manifest, wanted)["large"], found["large"])
    raw[rows // 2 * 400 + 1000] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CorruptCheckpointError):
        read_rows(storage, folder, manifest, wanted)


def read_rows(storage, folder, manifest, wanted):
    reader, spans = StateReader(storage, folder, manifest, "replicated"), iter(wanted.values())
    try:
        return reader.visit(lambda note, rows: rows.read(*next(spans)))
    finally:
        reader.close()

"""State in files: what was written is what is read, alone or whole, and what was forged is refused."""

from __future__ import annotations

import gzip
import json
import pickle
import zlib

import pytest
import safetensors.torch
import torch

from distopt.checkpoint.errors import CorruptCheckpointError
from distopt.checkpoint.manifest import CHUNK_BYTES
from distopt.checkpoint.reader import verify
from distopt.checkpoint.statefile import StateReader
from tests.checkpoint.damage import Canary, check_refused, forge
from tests.checkpoint.states import assert_equal, commit_state


def test_file_when_written_is_read_by_the_safetensors_library(tmp_path):
    state = {"big": torch.randn(200, 200), "small": torch.arange(5), "half": torch.randn(300, 300).half()}
    storage, folder = commit_state(tmp_path, state)
    loaded = safetensors.torch.load_file(tmp_path / folder / "replicated.safetensors")
    assert_equal(loaded["replicated/big"], state["big"])
    assert_equal(loaded["replicated/half"], state["half"])
    assert_equal(loaded["packed/I64"], state["small"])


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


def test_rows_when_read_alone_are_checked_and_equal_those_read_with_the_rest(tmp_path):
    from tests.checkpoint.states import commit_state

    rows = 3 * CHUNK_BYTES // 400
    state = {"large": torch.randn(rows, 100), "small": torch.arange(12).reshape(6, 2)}
    storage, folder = commit_state(tmp_path, state)
    manifest = verify(storage, folder)
    wanted = {"large": (rows // 2, rows // 2 + 7), "small": (2, 5)}
    rows_read = read_rows(storage, folder, manifest, wanted)
    for name, (start, stop) in wanted.items():
        assert torch.equal(rows_read[name], state[name][start:stop])
    path = tmp_path / folder / "replicated.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1  # in a chunk that the rows of "large" do not touch
    path.write_bytes(raw)
    assert torch.equal(read_rows(storage, folder, manifest, wanted)["large"], rows_read["large"])
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

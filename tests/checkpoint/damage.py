"""Checkpoints whose bytes are changed, and what a restore makes of them."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pyro
import torch

from distopt.backends.single import Single
from distopt.checkpoint import Checkpointer
from distopt.checkpoint.chunks import by_chunk, chunk_digest
from distopt.checkpoint.manifest import FileRecord, seal
from distopt.run_files import MANIFEST

LAST, BEFORE = "step-00000002", "step-00000001"


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


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 16
    path.write_bytes(raw)


def forge(root, name, raw):
    """Replaces a file and gives the manifest its right digests, as an attacker would."""
    (root / LAST / name).write_bytes(raw)
    body = json.loads((root / LAST / MANIFEST).read_bytes())["body"]
    chunks = tuple(chunk_digest(chunk) for _, chunk in by_chunk([memoryview(raw)]))
    body["files"][name] = FileRecord(len(raw), chunks).as_json()
    (root / LAST / MANIFEST).write_bytes(seal(body))


def check_refused(root, caplog):
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark of memory starts anew
    before = peak_kib()
    step, log = restored_step(root, caplog)
    assert step == 1 and "Falling back" in log
    assert peak_kib() - before < 200 << 10


def peak_kib():
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")

"""Bytes that are not those that were written are noticed, named and never loaded; the checkpoint before is taken."""

from __future__ import annotations

import os
import pickle
import random
import shutil

import pytest

from distopt.checkpoint import CorruptCheckpointError
from distopt.checkpoint import reader as reader_module
from distopt.checkpoint.reader import verify
from distopt.checkpoint.storage.base import open_storage
from tests.checkpoint.damage import BEFORE, LAST, Canary, flip, restored_step
from tests.checkpoint.runs import checkpointer


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


def test_times_of_files_say_nothing_about_which_is_the_newest(tmp_path):
    with checkpointer(tmp_path) as keeper:
        for step in (1, 2, 3):
            keeper.save(step)
        keeper.wait()
        for step in (1, 2, 3):
            moment = 2_000_000_000 - step * 100_000  # a clock that ran backwards
            for path in [tmp_path / f"step-{step:08d}", *(tmp_path / f"step-{step:08d}").iterdir()]:
                os.utime(path, (moment, moment))
        assert keeper.restore().step == 3

"""Names in a directory of checkpoints: what distopt made is told from what it did not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distopt.checkpoint import CheckpointError
from distopt.checkpoint.storage.names import doomed_folder, final_folder, is_leftover, step_number, work_folder
from distopt.run_files import step_of

ATTEMPT = "0123456789ab"


@pytest.mark.parametrize("step", [0, 7, 99_999_999, 10**8, 10**18])
@pytest.mark.parametrize("rename", [True, False])
def test_step_is_read_from_the_final_name_and_a_work_folder_is_a_leftover(step, rename):
    final, work = final_folder(step, ATTEMPT, rename=rename), work_folder(step, ATTEMPT, rename=rename)
    assert step_of(final) == step and not is_leftover(final)
    assert is_leftover(work) is rename and (step_of(work) is None) is rename
    assert is_leftover(doomed_folder(final_folder(step, ATTEMPT, rename=True)))


@pytest.mark.parametrize("name", ["step-1", "step-00000001.bak", "xstep-00000001", ".tmp-notes", "STEP-00000001", ""])
def test_names_of_others_are_neither(name):
    assert step_of(name) is None and not is_leftover(name)


def test_names_of_deletions_differ_each_time():
    assert doomed_folder("step-00000001") != doomed_folder("step-00000001")


@pytest.mark.parametrize("step", [3, np.int64(3), torch.tensor(3)])
def test_whole_numbers_of_any_library_are_steps(step):
    assert step_number(step) == 3


@pytest.mark.parametrize("step", [-1, True, 1.0, "1", None, 10**19])
def test_what_no_folder_can_be_named_after_is_refused(step):
    with pytest.raises(CheckpointError, match="whole numbers"):
        step_number(step)

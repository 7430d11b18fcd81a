"""scvi-tools' `SaveCheckpoint` on several ranks: it saves models beside the trainer's checkpoints, by itself.

As it is, all ranks write and remove the same folders, and it removes a trainer's checkpoint as the one file that
Lightning writes. So while a trainer fits, such a callback is of a class that does both once, on rank 0.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint

_ENDING = ".ckpt"


@contextmanager
def saving_on_rank_0(trainer: Any, *, of_one_rank: bool) -> Iterator[None]:
    """Has every `SaveCheckpoint` of scvi-tools among a trainer's callbacks save on rank 0 alone meanwhile.

    Args:
        trainer: The trainer.
        of_one_rank: Whether each rank has the parameters of its own rows alone.

    Raises:
        ValueError: There is one, and rank 0's model would be of its own rows alone.
    """
    changed = [each for each in trainer.callbacks if _kind_of(type(each)) is not None]
    if changed and of_one_rank and trainer.world_size > 1:
        raise ValueError(
            f'{type(changed[0]).__name__} saves the model of one rank, which has its own rows alone with split="rows". '
            "Leave it out (enable_checkpointing=False), and call trainer.save_checkpoint(PATH) in a callback, which "
            "saves the rows of all ranks."
        )
    kinds: list[Any] = [type(each) for each in changed]
    for each, kind in zip(changed, kinds, strict=True):
        each.__class__ = _on_rank_0(kind)
    try:
        yield
    finally:
        for each, kind in zip(changed, kinds, strict=True):
            each.__class__ = kind


def _kind_of(kind: type) -> type | None:
    """Returns the class of scvi-tools that a class is or extends; scvi-tools is not imported for it."""
    return next((c for c in kind.__mro__ if c.__name__ == "SaveCheckpoint" and c.__module__.startswith("scvi.")), None)


@functools.cache
def _on_rank_0(kind: Any) -> type:
    class OnRank0(kind):  # type: ignore[misc]
        best_model_path: str

        def on_save_checkpoint(self, trainer: Any, *args: Any) -> None:
            trainer.strategy.align_buffers()
            if trainer.is_global_zero:
                super().on_save_checkpoint(trainer, *args)
            else:  # what saving leaves
                trainer._model.module.train()
                trainer._model.is_trained_ = False
            trainer.strategy.barrier()  # others may load it

        def _update_best_and_save(self, current: Any, trainer: Any, monitor_candidates: Any) -> None:
            ModelCheckpoint._update_best_and_save(self, current, trainer, monitor_candidates)
            if self.best_model_path.endswith(_ENDING):
                trainer.strategy.remove_checkpoint(self.best_model_path)
                self.best_model_path = self.best_model_path.removesuffix(_ENDING)

        def _remove_checkpoint(self, trainer: Any, filepath: str) -> None:
            ModelCheckpoint._remove_checkpoint(self, trainer, filepath)
            if trainer.is_global_zero:
                shutil.rmtree(filepath.split(_ENDING)[0], ignore_errors=True)

    OnRank0.__name__ = kind.__name__
    OnRank0.__qualname__ = kind.__qualname__  # by which Lightning finds its state in a checkpoint
    return OnRank0

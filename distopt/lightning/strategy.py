"""The strategy "distopt": Lightning's trainer on several ranks, for models of Pyro and for plain torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from typing import Any, get_args

import numpy as np
import pyro.infer
import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from distopt.backends import Backend, BackendError
from distopt.checkpoint.module_state import align_buffers_
from distopt.config.reduce import ReduceOptions
from distopt.infer import SVI, everywhere
from distopt.infer.capture.modes import CaptureMode, check_mode
from distopt.infer.torch_closures import average_gradients_, by_kind
from distopt.lightning.checkpoints import TrainerCheckpoints
from distopt.lightning.loaders import Share, Split, StepLoaders, split_loader
from distopt.lightning.model_saves import saving_on_rank_0
from distopt.lightning.parallel import ProcessStrategy, StartMethod
from distopt.lightning.plates import unscaled_plates
from distopt.optim.distributed import DistributedOptimizer
from distopt.optim.distributed.svi_step import run_once
from distopt.reduce import DisagreementError, DriftError, PeerError
from distopt.reduce.agreement import share_values_
from distopt.rng import NoisePolicy, generators_state, seed_all, set_generators_state
from distopt.sharding import PlateShard, local_parameter

_WHOLE = Share(None, 1.0, 0, 0)
_KNOWN_TO_ALL = (BackendError, PeerError, DisagreementError, DriftError)
_VALIDATION = 1 << 40  # steps of validation's noise begin here, beyond those of training


class DistoptStrategy(ProcessStrategy):
    """Trains on several ranks: `Trainer(strategy="distopt", devices=W)`, or scvi's `train(strategy=..., device=W)`.

    While the trainer fits, every `pyro.infer.SVI` that steps is distributed, whoever made it, as inside
    `distopt.infer.everywhere`; in automatic optimization, and where a manual one steps a torch optimizer, gradients are
    averaged. All ranks hold equal parameters at every step. A `pyro.optim` optimizer that is called without an SVI
    averages, too, but counts the shares of a batch alike, even if one has a row more.

    The strategy takes the rows that each rank reads into its own hands: Lightning's samplers repeat rows. Their order
    follows from seed and epoch alone, and the noise of a step from seed, step and rank. Validation is not split: every
    rank computes the numbers of one process, from equal parameters, with equal noise. Buffers of floating point, as the
    statistics of batch norm, are averaged before each validation and at the end.

    Args:
        split: `batches`: each batch is split, so that the steps are those of one process. `deal`: as many batches as
            there are ranks make a step. For both, every rank has all the data. `rows`: every rank has rows of its own,
            which it cuts into as many batches as the rank with the most. `none`: loaders are left as they are.
        plates: Names of plates of the model that are split over the ranks, for `split="rows"`.
        rows: For each plate, (size,) global index of each row of this rank, as for `distopt.infer.shard`.
        local: As for `distopt.infer.shard`.
        replicated: As for `distopt.infer.shard`.
        seed: Of the order and the noise; None for that of Lightning's `seed_everything`, or what rank 0's generator was
            seeded with.
        noise: Whether ranks draw different numbers in a step.
        reduce: How gradients of several ranks become one.
        capture: Which steps of a `pyro.infer.SVI` run from a recording, as for `distopt.infer.everywhere`.
        start_method: How processes start that no launcher has started: `popen` or `fork`; None takes what works here.
        timeout: For every wait for the other ranks.
        process_group_backend: Of torch, such as `gloo`; None for the one of the device.
        **kwargs: Of Lightning's `ParallelStrategy`.

    Raises:
        ValueError: An argument has another value than those here.

    Cost:
        That of `DistributedOptimizer` in each step; an all-reduce of the buffers for each validation.
    """

    strategy_name = "distopt"

    def __init__(
        self,
        split: Split = "batches",
        *,
        plates: str | Iterable[str] = (),
        rows: Mapping[str, ArrayLike] | None = None,
        local: Mapping[str, int | tuple[str, int]] | None = None,
        replicated: Iterable[str] = (),
        seed: int | None = None,
        noise: NoisePolicy = "independent",
        reduce: ReduceOptions = ReduceOptions(),  # noqa: B008  # frozen
        capture: CaptureMode = "off",
        start_method: StartMethod | None = None,
        timeout: timedelta = default_pg_timeout,
        process_group_backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        if split not in get_args(Split):
            raise ValueError(f"split={split!r}: expected {', '.join(map(repr, get_args(Split)))}.")
        check_mode(capture)
        super().__init__(
            start_method=start_method, timeout=timeout, process_group_backend=process_group_backend, **kwargs
        )
        self._split: Split = split
        self._plates = (plates,) if isinstance(plates, str) else tuple(plates)
        self._sharding: dict[str, Any] = {"rows": rows, "local": local, "replicated": tuple(replicated)}
        self._options: dict[str, Any] = {"noise": noise, "reduce": reduce, "capture": capture}
        self._rng_policy: NoisePolicy = noise
        self._given_seed = seed
        self._seed = 0
        self._trainer: Any = None
        self._distributed = ExitStack()
        self._checkpoints = TrainerCheckpoints()
        self._loaders = StepLoaders()
        self._share = _WHOLE
        self._batch_plates: list[PlateShard] = []
        self._plates_by_size: list[str] = []  # of the model that is adopted now
        self._is_averaged = False
        self._has_stepped_svi = False
        self._rng_before: Mapping[str, Any] | None = None

    # Before and after training.

    def setup_environment(self) -> None:
        """Meets the other ranks, and agrees on the seed."""
        super().setup_environment()
        self._seed = int(self.backend.all_gather_json(_initial_seed(self._given_seed))[0])

    def setup(self, trainer: Any) -> None:
        """Gives all ranks equal first values, and makes distributed what will step."""
        self._trainer = trainer
        trainer._accelerator_connector.use_distributed_sampler = False  # the only switch that comes early enough
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            return

        module = self.lightning_module
        assert module is not None
        self._refuse(module.automatic_optimization)
        share_first_values(module, self.backend, with_buffers=self._split != "rows")
        self._distributed.enter_context(saving_on_rank_0(trainer, of_one_rank=self._split == "rows"))
        self._distributed.enter_context(
            everywhere(
                self._plates,
                **self._sharding,
                weight=lambda: self._share.weight,
                find_plates=self._find_plates,
                on_adopt=self._on_adopt,
                torch_closures=False,
                **self._options,
            )
        )

    def teardown(self) -> None:
        """Makes plain again what was distributed; the ranks stay connected."""
        self._distributed.close()
        self._checkpoints = TrainerCheckpoints()
        self._loaders = StepLoaders()
        self._share = _WHOLE
        self._batch_plates.clear()
        super().teardown()

    def on_exception(self, exception: BaseException) -> None:
        """Tells the other ranks why this one stops, wherever it was raised."""
        self._distributed.close()
        # Also of an interrupt or an exit, which may be this rank's alone: the others would wait for it until a timeout.
        if self._backend is not None and not isinstance(exception, _KNOWN_TO_ALL):
            self._backend.fail(exception)

    def _refuse(self, automatic: bool) -> None:
        """Refuses what would train wrongly."""
        if automatic and self._plates:
            raise ValueError(
                f"plates={self._plates!r}: this LightningModule leaves the step to Lightning "
                "(automatic_optimization), which averages all gradients, also those of the datapoints of one rank. "
                "Step a pyro.infer.SVI in training_step, with automatic_optimization = False, as scvi's "
                "PyroTrainingPlan does."
            )
        if self._split == "rows" and self._start_method == "fork" and self.launcher is not None:
            raise ValueError(
                'split="rows" from a notebook: the rows that other processes have trained would not come back to this '
                'one. Run a script (python train.py, or torchrun), or load all rows and use split="batches".'
            )

    # What a rank reads.

    def process_dataloader(self, dataloader: Any) -> Any:
        """Returns a training loader with this rank's share of each batch; others are left whole; a collective call."""
        if not self._trainer.training or self.world_size == 1 and not hasattr(dataloader, "dataset"):
            return dataloader
        dataloader, sampler = split_loader(dataloader, self._split, self.backend, self._seed, self._position)
        self._loaders.add(sampler)
        return dataloader

    def _position(self) -> tuple[int, int]:
        """Returns the epoch, and the number of its batches that are done: not 0 after a resume within an epoch."""
        loop = self._trainer.fit_loop
        num_done = int(loop.epoch_loop.batch_progress.current.ready)
        return int(self._trainer.current_epoch), num_done if num_done < loop.max_batches else 0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Starts the noise of this step."""
        if batch_idx == 0:
            assert self.lightning_module is not None
            self._checkpoints.start_epoch(self.lightning_module)
        self._share = self._loaders.share(batch_idx)
        for plate in self._batch_plates:  # a batch that every rank reads whole is not split
            plate.num_shards = self.world_size if self._share.num_rows < self._share.num_all else 1
        seed_all(self._seed, int(self._trainer.fit_loop.total_batch_idx), self.global_rank, self._rng_policy)

    # What steps: an SVI, or Lightning.

    def _find_plates(self, svi: pyro.infer.SVI, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterable[str]:
        """Returns plates that are as large as each rank's share of the batch: nothing else scales them to all rows."""
        is_kept = _keeps_its_model(svi, self._split, self.world_size)
        if is_kept or self.world_size == 1 or not self._loaders.sizes:
            self._plates_by_size = []
            if is_kept and isinstance(svi.optim, DistributedOptimizer):  # left alone, but it has a state
                self._on_adopt(svi, args, kwargs)
            return ()
        names = [name for size in self._loaders.sizes for name in unscaled_plates(svi.model, args, kwargs, size)]
        self._loaders.refuse_unscaled(names)
        by_rank = self.backend.all_gather_json(names)  # a rank with a row more may take another plate for one of rows
        self._plates_by_size = [name for name in names if all(name in each for each in by_rank)]
        return self._plates_by_size

    def _on_adopt(self, svi: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        module = self.lightning_module
        assert module is not None
        if not isinstance(svi, pyro.infer.SVI):  # an optimizer that is stepped without one
            self._checkpoints.adopt(svi, lambda: None, module)
            return
        self._has_stepped_svi = True
        self._checkpoints.adopt(svi.optim, lambda: run_once(svi, args, kwargs), module)
        self._batch_plates += [svi.model.plates[name] for name in self._plates_by_size if name in svi.model.plates]

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Weighs the loss by the rows of this rank before its gradients are computed."""
        if self._share.weight != 1.0:
            closure_loss = closure_loss * self._share.weight
        result: Tensor = super().backward(closure_loss, optimizer, *args, **kwargs)
        return result

    def post_backward(self, closure_loss: Tensor) -> None:
        """Averages the gradients, before Lightning clips them; not while they are still accumulated."""
        module = self.lightning_module
        assert module is not None
        if module.automatic_optimization and self._trainer.fit_loop._should_accumulate():
            return
        average_gradients_(self.backend, [param for param in module.parameters() if param.requires_grad])
        self._is_averaged = True

    def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        """Averages, in manual optimization, the gradients of a backward that Lightning has not seen."""
        module = self.lightning_module
        assert module is not None
        if not module.automatic_optimization:
            closure = self._averaging(optimizer, closure)
        return super().optimizer_step(optimizer, closure, model, **kwargs)

    def _averaging(self, optimizer: Any, closure: Any) -> Any:
        def averaged() -> Any:
            result = closure()
            params = [param for group in optimizer.param_groups for param in group["params"]]
            # An optimizer without gradients beside an SVI only counts steps, as that of scvi's plans does.
            has_gradients = any(param.grad is not None for param in params)
            if not self._is_averaged and (has_gradients or not self._has_stepped_svi):
                for gradient in [param.grad for param in params if param.grad is not None]:
                    gradient.mul_(self._share.weight)
                average_gradients_(self.backend, params)
            self._is_averaged = False
            return result

        return averaged

    # Validation, and the end.

    def on_validation_start(self) -> None:
        """Makes buffers equal, and starts noise that is the same on all ranks."""
        self.align_buffers()
        self._rng_before = generators_state(self.root_device)
        seed_all(self._seed, _VALIDATION + int(self._trainer.current_epoch), 0, "shared")

    def on_validation_end(self) -> None:
        """Returns to the noise before."""
        if self._rng_before is not None:
            set_generators_state(self._rng_before, self.root_device)
            self._rng_before = None

    def on_train_end(self) -> None:
        """Makes buffers equal."""
        self.align_buffers()

    # Checkpoints, which are folders of distopt's at the paths that Lightning gives.

    def save_checkpoint(self, checkpoint: Mapping[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint into a folder of this path; all ranks call it.

        Raises:
            CheckpointError: Something to be kept is neither plain nor a tensor, such as a hyperparameter; names it.
        """
        self.align_buffers()
        path = self.broadcast(str(filepath))
        self._checkpoints.save(path, checkpoint, self._seed, self._trainer, self.backend)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Returns what Lightning restores of a checkpoint; the rest follows when training starts."""
        tree = self._checkpoints.load(checkpoint_path, self.backend)
        self._seed = self._checkpoints.seed or 0
        return tree

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Restores weights where nothing is trained; training restores them later, when all of them exist."""
        module = self.lightning_module
        assert module is not None
        if module.trainer.state.fn != TrainerFn.FITTING:
            self._checkpoints.load_weights(module, self.backend)

    def remove_checkpoint(self, filepath: Any) -> None:
        """Removes a checkpoint's folder."""
        if self.is_global_zero:
            shutil.rmtree(filepath, ignore_errors=True)

    def on_train_start(self) -> None:
        """Restores what a checkpoint holds beside the parameters of SVIs."""
        module = self.lightning_module
        assert module is not None
        self._checkpoints.start(module, self.backend)

    def align_buffers(self) -> None:
        """Averages the ranks' buffers of floating point; a collective call."""
        module: Any = self.lightning_module
        if self._trainer.state.fn != TrainerFn.FITTING or self._trainer.sanity_checking:
            return
        modules: dict[str, nn.Module] = {"": module}
        if self._split == "rows":  # other buffers may hold what a rank's own rows are
            modules = {name: each for name, each in module.named_modules() if isinstance(each, _NormBase)}
        align_buffers_(modules, self.backend)


def _keeps_its_model(svi: pyro.infer.SVI, split: Split, num_workers: int) -> bool:
    """Returns whether an SVI is one of distopt's, whose model and weight are left as they are.

    Raises:
        TypeError: Its loss would have to be weighed by the rows of each share.
    """
    if not isinstance(svi, SVI):
        return False
    if num_workers > 1 and split in ("batches", "deal"):
        raise TypeError(
            f"split={split!r}: this LightningModule steps a distopt.infer.SVI, which weighs its loss by an argument "
            "and not by the rows of each share, so that the ranks' mean would not be the loss of the batch. Step a "
            "pyro.infer.SVI, which the strategy makes distributed."
        )
    return True


def _initial_seed(given: int | None) -> int:
    if given is not None:
        return given
    return int(os.environ.get("PL_GLOBAL_SEED") or torch.initial_seed() % np.iinfo(np.int64).max)


def share_first_values(module: nn.Module, backend: Backend, *, with_buffers: bool) -> None:
    """Gives all ranks rank 0's parameters; those of a rank's own rows, and of other shapes on some rank, stay.

    Args:
        module: The module.
        backend: Link to the other ranks.
        with_buffers: Whether buffers, too; they may hold what a rank's own rows are.
    """
    if backend.world_size == 1:
        return
    tensors: dict[str, Tensor] = {
        name: each for name, each in module.named_parameters() if local_parameter(each) is None
    }
    if with_buffers:
        tensors |= dict(module.named_buffers())
    shapes = {name: [list(each.shape), str(each.dtype)] for name, each in tensors.items()}
    by_rank = backend.all_gather_json(shapes)
    common = [name for name in sorted(tensors) if all(each.get(name) == shapes[name] for each in by_rank)]
    for kind in by_kind(tensors[name].detach() for name in common):
        share_values_(backend, kind, owner=0)

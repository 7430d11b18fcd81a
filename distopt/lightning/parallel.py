"""Processes under Lightning: who starts them, and what they tell each other, by distopt's backend.

It is what Lightning's `DDPStrategy` does, without being one: scvi-tools switches early stopping off for every strategy
that is a `DDPStrategy`. And waits here end with the cause when another rank has failed.
"""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any, Literal, TypeAlias

import torch
from lightning.fabric.utilities.distributed import (
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
)
from lightning.fabric.utilities.imports import _IS_INTERACTIVE
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning_utilities.core.rank_zero import rank_zero_only as rank_zero_only_of_utilities
from torch import Tensor

import distopt
from distopt.backends import Backend, BackendError, joined_world
from distopt.lightning.forked import ForkingLauncher

StartMethod: TypeAlias = Literal["popen", "fork"]
_OPS: dict[str, Literal["sum", "min", "max"]] = {"sum": "sum", "mean": "sum", "avg": "sum", "min": "min", "max": "max"}


class ProcessStrategy(ParallelStrategy):  # type: ignore[misc]
    """One process for each device, on one or several hosts.

    Args:
        start_method: How processes are started that no launcher has started: `popen` runs the script again, `fork`
            works in a notebook; None takes what works here.
        timeout: For every wait for the other ranks.
        process_group_backend: Of torch, such as `gloo`; None for the one of the device.
        **kwargs: Of Lightning's `ParallelStrategy`.
    """

    def __init__(
        self,
        *,
        start_method: StartMethod | None,
        timeout: timedelta,
        process_group_backend: str | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if start_method not in (None, "popen", "fork"):
            raise ValueError(f"start_method={start_method!r}: expected 'popen', 'fork' or None.")
        self._num_nodes = 1
        self._start_method = start_method or ("fork" if _IS_INTERACTIVE else "popen")
        self._timeout = timeout
        self._process_group_backend = process_group_backend
        self._backend: Backend | None = None

    @property
    def backend(self) -> Backend:
        """The link to the other ranks; there is one once the trainer has begun."""
        if self._backend is None:
            raise BackendError("the ranks have not met yet: they do when the trainer begins to fit, validate or test.")
        return self._backend

    # What Lightning asks for of a strategy with several processes.

    @property
    def is_distributed(self) -> bool:
        """True, so that `self.log(..., sync_dist=True)` averages."""
        return True

    @property
    def root_device(self) -> torch.device:
        """The device of this rank."""
        assert self.parallel_devices is not None
        device: torch.device = self.parallel_devices[self.local_rank]
        return device

    @property
    def num_nodes(self) -> int:
        """Number of hosts."""
        return self._num_nodes

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        self._num_nodes = num_nodes

    @property
    def num_processes(self) -> int:
        """Number of processes on this host."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """The ranks, for samplers of Lightning's when it predicts."""
        return {"num_replicas": self.num_nodes * self.num_processes, "rank": self.global_rank}

    def set_world_ranks(self) -> None:
        """Tells the environment the rank and the number of ranks."""
        if self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        rank_zero_only.rank = self.global_rank
        rank_zero_only_of_utilities.rank = self.global_rank

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if self.num_processes * self.num_nodes == 1:
            return
        if self._start_method == "popen":
            self._launcher = _SubprocessScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)
        elif not self.cluster_environment.creates_processes_externally:
            self._launcher = ForkingLauncher(self, start_method="fork")

    def setup_environment(self) -> None:
        """Meets the other ranks; a world of this process alone that the script has made before is left."""
        super().setup_environment()
        reset_seed()
        self.set_world_ranks()
        alone = joined_world()
        if alone is not None and alone.world_size == 1 < self.world_size:
            alone.close()  # `distopt.init()` in a script that Lightning then starts more processes of, or forks

        if self.world_size > 1:
            library = self._process_group_backend or _get_default_process_group_backend_for_device(self.root_device)
            _init_dist_connection(self.cluster_environment, library, timeout=self._timeout)
        self._backend = distopt.init(timeout=self._timeout, world_size=self.world_size)
        self._backend.device = self.root_device

    def model_to_device(self) -> None:
        """Moves the model to this rank's device."""
        assert self.model is not None
        self.model.to(self.root_device)

    # What ranks tell each other. A wait of the backend's ends when another rank has failed, with its cause.

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Returns when all ranks have called it."""
        if self._backend is not None and not self._backend.closed:
            self._backend.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Returns rank `src`'s object. What JSON cannot carry is pickled, as Lightning does it."""
        if self._backend is None or self._backend.world_size == 1:
            return obj
        plain = self._backend.all_gather_json(_as_json(obj) if self.global_rank == src else None)[src]
        if plain is not None:
            return json.loads(plain)
        objects = [obj]
        torch.distributed.broadcast_object_list(objects, src)
        return objects[0]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Returns a tensor that is combined over the ranks; what is no tensor is returned as it is.

        Args:
            tensor: On every rank of one shape.
            group: A process group; None for all ranks.
            reduce_op: `mean`, `sum`, `min` or `max`, or one of torch's.
        """
        if not isinstance(tensor, Tensor) or self._backend is None or self._backend.world_size == 1:
            return tensor

        name = str(reduce_op).lower().rpartition(".")[2]
        if group is not None or name not in _OPS:
            raise ValueError(
                f"reduce_op={reduce_op!r}, group={group!r}: expected mean, sum, min or max over all ranks."
            )

        combined = tensor.detach().clone().contiguous()
        self._backend.all_reduce(combined, _OPS[name]).wait()
        return combined / self.world_size if name in ("mean", "avg") else combined


def _as_json(obj: Any) -> str | None:
    """Returns an object as JSON; None if it would come back as something else."""
    try:
        text = json.dumps(obj)
        return text if type(json.loads(text)) is type(obj) and json.loads(text) == obj else None
    except (TypeError, ValueError):
        return None

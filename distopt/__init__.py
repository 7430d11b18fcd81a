"""distopt: distributed training for probabilistic models written in Pyro.

A script becomes distributed by three lines:

    worker = distopt.init()                                   # finds out who started the process, and its rank
    from distopt.optim import Adam, DistributedOptimizer      # in place of pyro.optim
    svi = SVI(model, guide, DistributedOptimizer(Adam({"lr": 0.01})), Trace_ELBO())

and is started by `python`, `torchrun`, `horovodrun` or `mpirun`. Without a script: `distopt launch RUN.yaml`.

    init()        joins the world that the launcher has made; returns the Backend: rank, world_size, device
    load_run()    a run that trained, or still trains, for a notebook: posterior, samples, predictions, metrics
    Backend       what ranks can send each other

    optim         DistributedOptimizer, and Adam, ClippedAdam and all of torch's optimizers and schedules, per parameter
    infer         SVI over ranks; sharded_plate, shard, gather_local: a latent variable per datapoint; everywhere()
    data          GlobalBatches and shard_rows: which rows a rank reads; Loader and sources: reading them
    checkpoint    Checkpointer: the state of a run on disk, while it continues
    train         Task and Logger: what a YAML trains, and where it logs
    config        the YAML: load_config, all_keys, explain_yaml
    reduce        ReduceOptions, CommHook: how gradients of many workers become one
    backends      torch_dist, horovod, mpi, single, and Backend for one of your own

Importing this package is cheap: torch and Pyro are imported when a name that needs them is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distopt.backends import Backend, init
    from distopt.train import load_run

__all__ = ["Backend", "init", "load_run", "__version__"]

_HOME = {"Backend": "distopt.backends", "init": "distopt.backends", "load_run": "distopt.train"}
_PACKAGES = ("backends", "checkpoint", "config", "data", "infer", "optim", "reduce", "train")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # costs more than everything else here

        # Looked up once: each search leaves cycles behind, and every checkpoint asks.
        return globals().setdefault(name, version("distopt"))
    if name in _HOME:
        home = import_module(_HOME[name])
        if name == "init":
            home.on_join(_watch_pyro)
        return getattr(home, name)
    if name in _PACKAGES:
        return import_module(f"distopt.{name}")
    raise AttributeError(f"module 'distopt' has no attribute {name!r}")


def _watch_pyro() -> None:
    """Has Pyro's own optimizers and samplers say so when they see one rank's data alone."""
    import_module("distopt.optim.distributed.pyro_hooks").install()


def __dir__() -> list[str]:
    return sorted([*__all__, *_PACKAGES])

"""Compiles a graph by torch's inductor: every process gets the same bits, and one of a host compiles."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from distopt.infer.capture import decompositions
from distopt.infer.capture.recording import TensorInfo

logger = logging.getLogger(__name__)

MAX_COMPILERS = 8
"""Processes that compile a GPU's kernels: 12 took 8 seconds for a step of 51 sites on an H100's host."""

_functions: dict[str, Callable[..., Any]] = {}  # by key: a list that is met twice in a process is compiled once


def compile_graph(graph: fx.GraphModule, examples: list[Tensor]) -> tuple[str, Callable[..., Any]]:
    """Returns a compiled function of tensors like the examples, and the key of what its bits depend on.

    Raises:
        Exception: Whatever inductor raises, or what is missing: a C++ compiler, on a GPU Triton.
    """
    key = _key(graph, examples)
    if key not in _functions:
        with _lock(key):
            _functions[key] = _run_compiler(graph, examples)
    return key, _functions[key]


def _key(graph: fx.GraphModule, examples: list[Tensor]) -> str:
    """Returns a hash of all that the bits of a compiled function depend on."""
    shapes = [tuple(TensorInfo.of(example))[:4] for example in examples]
    nodes = [(node.op, node.name, str(node.target), str(node.args), str(node.kwargs)) for node in graph.graph.nodes]
    machine = _machine_of(_device_of(examples))
    described = nodes, shapes, torch.__version__, machine, decompositions.TEXT
    return hashlib.sha256(repr(described).encode()).hexdigest()[:16]


def _device_of(examples: list[Tensor]) -> torch.device:
    return next((each.device for each in examples if each.device.type == "cuda"), torch.device("cpu"))


def _machine_of(device: torch.device) -> tuple[Any, ...]:
    """Returns the compiler and processor that the bits of a compiled function depend on, and its threads."""
    if device.type == "cuda":
        import triton

        return triton.__version__, torch.version.cuda, torch.cuda.get_device_name(device)
    from torch._inductor.cpp_builder import get_cpp_compiler

    return get_cpp_compiler(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()


def _run_compiler(graph: fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
    import torch._functorch.config as tracing_config
    import torch._inductor.config as config

    # Compiled in this process: a pool of processes takes longer to start than one file of C++ takes to compile. A GPU's
    # kernels are compiled one by one. Threads are part of the compiled code. Kernels of a GPU must not be chosen by how
    # quick they are at that moment, nor add in an order that follows from it.
    on_gpu = _device_of(examples).type == "cuda"
    options = {
        "fallback_random": True,
        "compile_threads": min(MAX_COMPILERS, len(os.sched_getaffinity(0))) if on_gpu else 1,
        "cpp.threads": torch.get_num_threads(),
        "fx_graph_cache": True,
        "size_asserts": False,  # the program has looked at all of them
    }
    # One thread adds in one order, whatever it runs; its loops then take gradients of gathers in with the rest.
    many = on_gpu or torch.get_num_threads() > 1
    if hasattr(config, "deterministic"):  # since torch 2.9
        options["deterministic"] = many
    # The cache of traced graphs does not look at decompositions: it would hand over what others have made of the graph.
    uncached = tracing_config.patch(enable_autograd_cache=False)
    with ExitStack() as stack:
        for each in (config.patch(options), uncached, torch.no_grad(), warnings.catch_warnings()):
            stack.enter_context(each)
        stack.enter_context(_keeping_environment())
        stack.enter_context(_choosing(many))
        warnings.simplefilter("ignore")  # of torch about itself
        from torch._guards import TracingContext, tracing
        from torch._inductor.compile_fx import compile_fx
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        decompositions.lower_store()
        # Without an environment for shapes the compiler passes its cache by. Tensors of real memory would be taken as
        # ones whose shapes may change.
        mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
        fakes = [mode.from_tensor(example, static_shapes=True) for example in examples]
        with tracing(TracingContext(mode)):
            function: Any = compile_fx(graph, fakes, decompositions=decompositions.Table())
    if on_gpu:
        from torch._inductor.async_compile import shutdown_compile_workers

        shutdown_compile_workers()
    return function  # type: ignore[no-any-return]  # torch leaves open what it takes


@contextmanager
def _choosing(is_deterministic: bool) -> Iterator[None]:
    """Has the compiler choose operations that give the same bits each time, or the quickest, where it has two."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(is_deterministic, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def _keeping_environment() -> Iterator[None]:
    """Takes back what the compiler tells the libraries that it loads: processes that start later are not meant."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]


@contextmanager
def _lock(key: str) -> Iterator[None]:
    """Lets one process of a host compile a list, while the others wait for what it leaves in the compiler's cache."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    # A file of another user's, or a file system without locks: then each process compiles by itself.
    with ExitStack() as stack:
        try:
            folder = Path(cache_dir())
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(os.fspath(folder / f"distopt-{key}.lock"), "w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            logger.debug("compiling without a lock: %s", error)
        else:
            # Not left to closing it: a process that was forked meanwhile has the same file open.
            stack.callback(fcntl.flock, file, fcntl.LOCK_UN)
        yield

"""Compiles the loops in C++ where torch and a compiler are at hand; without them distopt is pure Python."""

import os
import sys

from setuptools import Extension, setup

PURE_VARIABLE = "DISTOPT_PURE"
"""Where it is set, nothing is compiled, and the wheel is for every platform and every torch."""

# The threads of `at::parallel_for`; the library behind them is the one that torch has loaded.
_OPENMP = ["-fopenmp"] if sys.platform == "linux" else []


def extensions() -> list[Extension]:
    """Returns the compiled loops for the torch that is installed; none in an isolated build, which has none."""
    if os.environ.get(PURE_VARIABLE):
        return []
    try:
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths
    except (ImportError, OSError):
        return []
    return [
        Extension(
            "distopt.optim._bulk",
            ["distopt/optim/_bulk.cpp"],
            include_dirs=include_paths(),
            library_dirs=library_paths(),
            libraries=["c10", "torch_cpu", "torch_python"],
            define_macros=[("DISTOPT_TORCH", f'"{torch.__version__}"')],
            # No contraction: what an element is rounded to would follow from the instructions that it is computed by.
            extra_compile_args=[
                "-std=c++20",
                "-O3",
                "-g0",
                "-ffp-contract=off",
                "-fno-math-errno",
                "-fno-trapping-math",
            ]
            + _OPENMP,
            optional=True,
        ),
        Extension(
            "distopt.infer.capture._graph",
            ["distopt/infer/capture/_graph.cpp", "distopt/infer/capture/_quick_tests.cpp"],
            include_dirs=include_paths(),
            library_dirs=library_paths(),
            libraries=["c10", "torch_cpu", "torch", "torch_python"],
            define_macros=[("DISTOPT_TORCH", f'"{torch.__version__}"')],
            # No contraction: a * b + c would be rounded once instead of twice, and differ from ATen's.
            # -O3 turns loops over elements into vectors, which at -O2 stay as they are where operands may overlap.
            extra_compile_args=["-std=c++20", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", *_OPENMP],
            depends=["distopt/infer/capture/_direct.h", "distopt/infer/capture/_loops.h"],
            optional=True,
        ),
        *([_shared_memory(include_paths())] if sys.platform == "linux" else []),
    ]


def _shared_memory(include_dirs: list[str]) -> Extension:
    """Returns the sums in shared memory, which ask Linux for its futexes; of torch it has pybind11's headers alone."""
    return Extension(
        "distopt.backends._shared_memory",
        ["distopt/backends/_shared_memory.cpp"],
        include_dirs=include_dirs,
        extra_compile_args=["-std=c++20", "-O3", "-g0", "-fvisibility=hidden"],
        optional=True,
    )


setup(ext_modules=extensions())

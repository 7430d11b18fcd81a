"""The state of every random number generator that a rank draws from, as JSON.

The lines on CUDA follow torch's documentation; the tests run on machines without a GPU, so none of them has run these.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from pyro.infer.autoguide import AutoGuide
from torch import nn

from distopt.checkpoint.errors import CorruptCheckpointError
from distopt.reduce.noise import generators_state, set_generators_state


def capture_noise(device: torch.device) -> dict[str, Any]:
    """Returns the state of Python's, numpy's and torch's generators; of a GPU's too when `device` is one.

    Cost: about 10 kB of JSON.
    """
    state = generators_state(device)
    version, words, gauss = state["python"]
    name, keys, position, has_gauss, cached = state["numpy"]
    noise = {
        "python": {"version": version, "words": _text(np.array(words, dtype="<u4").tobytes()), "gauss": gauss},
        "numpy": {
            "name": str(name),
            "keys": _text(np.asarray(keys, dtype="<u4").tobytes()),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
    }
    return noise | {kind: _text(state[kind].numpy().tobytes()) for kind in ("torch", "cuda") if kind in state}


def restore_noise(noise: dict[str, Any], device: torch.device) -> None:
    """Sets every generator to a captured state; a GPU that had none is seeded from the rest of it.

    Raises:
        CorruptCheckpointError: when the state is malformed; some generators may be set already.
    """
    try:
        python, of_numpy = noise["python"], noise["numpy"]
        words = np.frombuffer(_bytes(python["words"]), dtype="<u4").tolist()
        keys = np.frombuffer(_bytes(of_numpy["keys"]), dtype="<u4")
        state: dict[str, Any] = {
            "python": (python["version"], tuple(words), python["gauss"]),
            "numpy": (of_numpy["name"], keys, of_numpy["position"], of_numpy["has_gauss"], of_numpy["cached"]),
        }
        state |= {kind: _state(noise[kind]) for kind in ("torch", "cuda") if kind in noise}
        set_generators_state(state, device)
        if device.type == "cuda" and "cuda" not in noise:
            torch.cuda.default_generators[device.index or 0].manual_seed(_seed(digest_noise(noise)))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CorruptCheckpointError(f"noise state is malformed: {error}.") from error


def seed_noise(stream: str, device: torch.device) -> None:
    """Starts all generators of this process on a new stream: the same for the same words, unlike any other."""
    seed = _seed(stream)
    random.seed(seed)
    np.random.seed(seed & 0xFFFF_FFFF)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


def set_up_quietly(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Keeps the noise as it is while guides set themselves up at their first call.

    An autoguide draws a prototype trace then. The run that was saved had drawn it long before, so a resumed run that
    drew it again after its noise was restored would go on with other numbers.
    """
    for module in modules:
        for part in module.modules():
            if isinstance(part, AutoGuide) and part.prototype_trace is None and "_setup_prototype" not in vars(part):
                object.__setattr__(part, "_setup_prototype", _quiet(part, device))


def _quiet(guide: AutoGuide, device: torch.device) -> Callable[..., Any]:
    def set_up(*args: Any, **kwargs: Any) -> Any:
        noise = generators_state(device)
        vars(guide).pop("_setup_prototype", None)  # the class's own method is next in line
        try:
            return guide._setup_prototype(*args, **kwargs)
        finally:
            set_generators_state(noise, device)

    return set_up


def digest_noise(noise: dict[str, Any]) -> str:
    """Returns 16 hexadecimal digits: equal when two ranks are at the same place of the same stream."""
    return hashlib.sha256(json.dumps(noise, sort_keys=True).encode()).hexdigest()[:16]


def _seed(stream: str) -> int:
    return int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little") >> 1


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _state(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(_bytes(text)), dtype=torch.uint8)

"""Noise of several ranks: told apart by seed, and set apart where they would draw alike."""

from __future__ import annotations

import base64
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from pyro.infer.autoguide import AutoGuide
from torch import nn

from distopt import backends

NoisePolicy: TypeAlias = Literal["independent", "shared"]

# Odd, so that its multiples reach each of the 2**32 seeds before one comes again; 2**32 over the golden ratio, which
# keeps neighbours far apart (Knuth, The Art of Computer Programming, volume 3, section 6.4).
_STRIDE = 0x9E3779B1


def noise_seed(seed: int, step: int = 0, rank: int = 0, policy: NoisePolicy = "independent") -> int:
    """Returns the seed, in [0, 2**32), of what `rank` draws at `step`.

    Under `independent` no two ranks of a step have the same seed, so that `W` ranks are `W` particles of the ELBO and
    the variance of the averaged gradient is a `W`-th of one rank's. Under `shared` all ranks draw what rank 0 draws.

    The noise of a step depends on these four numbers alone, as the data do: it is the same after a crash, after a
    resume on another number of workers, and whatever was drawn before.

    Example:
        >>> len({noise_seed(7, step=3, rank=rank) for rank in range(1000)})
        1000
        >>> noise_seed(7, 3, 5, "shared") == noise_seed(7, 3, 0)
        True
    """
    # 32 bits: the Mersenne Twister that torch uses on the CPU looks at no more of its seed.
    (base,) = np.random.SeedSequence([seed, step]).generate_state(1, np.uint32)
    return (int(base) + (0 if policy == "shared" else rank) * _STRIDE) % 2**32


def seed_generators(seed: int) -> None:
    """Seeds torch, NumPy and Python's `random`."""
    random.seed(seed)
    np.random.seed(seed)
    # Not torch.manual_seed, which keeps a text of the call stack for each kind of GPU: 0.2 ms a step.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


def generators_state(device: torch.device) -> dict[str, Any]:
    """Returns the state of Python's, NumPy's and torch's generators; of a GPU's too when `device` is one."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(legacy=True), "torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_generators_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Goes on with the noise of a state that `generators_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def noise_state() -> int:
    """Returns a 64-bit digest of torch's generator: ranks with the same one draw the same noise from here on."""
    return int.from_bytes(hashlib.blake2b(torch.get_rng_state().numpy().tobytes(), digest_size=8).digest(), "little")


def set_apart(states: Sequence[int], rank: int) -> None:
    """Seeds this rank's generators anew if a lower rank is in the same state.

    Processes that torch starts all have one default seed, and a script seeds them alike more often than not.

    Args:
        states: Each rank's `noise_state`.
        rank: This rank.
    """
    if states[rank] in states[:rank]:
        seed_generators(noise_seed(states[rank], rank=rank))


# Noise: what each rank draws at each step, all of it from one seed.


_policy: list[NoisePolicy] = ["independent"]


def seed_noise(seed: int, step: int = 0, rank: int = 0, policy: NoisePolicy = "independent") -> None:
    """Seeds torch, NumPy and Python's `random` for `step`, see `noise_seed`.

    Under `shared`, sites in sharded plates still draw a rank's own noise, for their datapoints are its own.
    """
    _policy[0] = policy
    seed_generators(noise_seed(seed, step, rank, policy))


class OwnNoise:
    """A stretch of a shared stream in which a rank draws noise of its own, and after which all are in step again.

    The rank's seed is drawn from the shared stream, so it differs from site to site and is the same at each repetition.

    Args:
        rank: this rank, which tells its seed from the others'.
    """

    def __init__(self, rank: int) -> None:
        drawn = int(torch.randint(2**62, ()))
        self._cpu = torch.get_rng_state()
        self._gpu = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
        torch.manual_seed(noise_seed(drawn, rank=rank))

    def end(self) -> None:
        """Goes on with the shared stream."""
        torch.set_rng_state(self._cpu)
        if self._gpu is not None:
            torch.cuda.set_rng_state(self._gpu)


def begin_own_noise() -> OwnNoise | None:
    """Begins a stretch of this rank's own noise where the ranks share theirs; None where they do not."""
    if _policy[0] == "independent":
        return None
    return OwnNoise(backends.current().rank)


# The state of every random number generator that a rank draws from, as JSON.
#
# The lines on CUDA follow torch's documentation; the tests run on machines without a GPU, so none of them has run
# these.


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
        ValueError: When the state is malformed; some generators may be set already.
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
        raise ValueError(f"noise state is malformed: {error}.") from error


def seed_stream(stream: str, device: torch.device) -> None:
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

"""Random numbers of several ranks: seeds for each rank and step, streams that are told apart, and their saved state.

A model draws from three generators: Python's `random`, NumPy's, and torch's (a GPU has one more). They are seeded
together (`seed_all`), told apart where ranks would draw the same numbers by accident (`separate_streams`), and saved
and restored together (`capture_rng_state`). Errors here are `ValueError`; who reads a checkpoint says which one it is.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from distopt import backends

NoisePolicy: TypeAlias = Literal["independent", "shared"]
"""Whether each rank draws its own random numbers, or all ranks draw the same."""

# Odd, so that its multiples reach each of the 2**32 seeds before one comes again; 2**32 over the golden ratio, which
# keeps neighbours far apart (Knuth, The Art of Computer Programming, volume 3, section 6.4).
_STRIDE = 0x9E3779B1

# The policy of the last `seed_all`: handlers deep in a model ask for it, to which nobody could pass it.
_policy: list[NoisePolicy] = ["independent"]


# Seeds: one for each rank and step.


def rank_seed(seed: int, step: int = 0, rank: int = 0, policy: NoisePolicy = "independent") -> int:
    """Returns the seed, in [0, 2**32), of what `rank` draws at `step`.

    Under `independent` no two ranks of a step have the same seed, so that `W` ranks are `W` particles of the ELBO and
    the variance of the averaged gradient is a `W`-th of one rank's. Under `shared` all ranks draw what rank 0 draws.

    What a step draws depends on these four numbers alone, as its data do: it is the same after a crash, after a resume
    on another number of workers, and whatever was drawn before.

    Args:
        seed: Of the run.
        step: Steps done before.
        rank: This rank.
        policy: See above.

    Example:
        >>> len({rank_seed(7, step=3, rank=rank) for rank in range(1000)})
        1000
        >>> rank_seed(7, 3, 5, "shared") == rank_seed(7, 3, 0)
        True
    """
    # 32 bits: the Mersenne Twister that torch uses on the CPU looks at no more of its seed.
    (base,) = np.random.SeedSequence([seed, step]).generate_state(1, np.uint32)
    return (int(base) + (0 if policy == "shared" else rank) * _STRIDE) % 2**32


def seed_all(seed: int, step: int = 0, rank: int = 0, policy: NoisePolicy = "independent") -> None:
    """Seeds torch, NumPy and Python's `random` for one step of one rank, see `rank_seed`.

    Under `shared`, sites in sharded plates still draw different numbers on each rank, since their datapoints differ.

    Args:
        seed: Of the run.
        step: Steps done before.
        rank: This rank.
        policy: Whether ranks draw different numbers; it holds until the next call.
    """
    _policy[0] = policy
    seed_generators(rank_seed(seed, step, rank, policy))


def seed_generators(seed: int) -> None:
    """Seeds torch, NumPy and Python's `random`.

    Args:
        seed: In [0, 2**32), as NumPy asks for.
    """
    random.seed(seed)
    np.random.seed(seed)
    # Not torch.manual_seed, which keeps a text of the call stack for each kind of GPU: 0.2 ms a step.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


@contextmanager
def drawing_alike(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Has all ranks draw the same meanwhile, but for sites in sharded plates; afterwards generators are as before.

    Args:
        seed: As for `seed_all`.
        step: As for `seed_all`.
        device: Of this rank.
    """
    state = generators_state(device)
    policy = _policy[0]
    seed_all(seed, step, policy="shared")
    try:
        yield
    finally:
        set_generators_state(state, device)
        _policy[0] = policy


def seed_stream(name: str, device: torch.device) -> None:
    """Starts all generators of this process on a new stream: the same for the same name, and unlike any other.

    Args:
        name: Any text.
        device: Of this rank; the generator of a GPU is seeded too.
    """
    seed = _seed_of(name)
    random.seed(seed)
    np.random.seed(seed & 0xFFFF_FFFF)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


def _seed_of(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1


# Streams: where ranks must not draw the same numbers.


def generator_digest() -> int:
    """Returns a 64-bit digest of torch's generator: ranks with the same one draw the same numbers from here on."""
    return int.from_bytes(hashlib.blake2b(torch.get_rng_state().numpy().tobytes(), digest_size=8).digest(), "little")


def separate_streams(digests: Sequence[int], rank: int) -> None:
    """Seeds this rank's generators anew if a lower rank would draw the same numbers.

    Processes that torch starts all have one default seed, and a script gives all of them the same seed more often than
    not.

    Args:
        digests: Each rank's `generator_digest`.
        rank: This rank.
    """
    if digests[rank] in digests[:rank]:
        seed_generators(rank_seed(digests[rank], rank=rank))


class RankStream:
    """A stretch of a shared stream in which this rank draws different numbers than the others.

    The rank's seed is drawn from the shared stream, so it differs from site to site and is the same at each repetition.
    All ranks draw it, whether or not they use as many numbers in between, so all of them are in step again at the end.

    Args:
        rank: This rank, which tells its seed from the others'.
    """

    def __init__(self, rank: int) -> None:
        _host_call.get()("a rank's own stream begins", _entering(rank), torch.randint(2**62, ()))

    def end(self) -> None:
        """Returns to the shared stream."""
        _host_call.get()("a rank's own stream ends", _return_to_shared_stream)


# A captured step does not run the code above, so whoever records a step notes what is called here, to call it again in
# each captured one. These are functions of the module, for two recordings of one step must name the same.

_shared_states: list[tuple[Tensor, Tensor | None]] = []  # of the streams that were left, the last one last


def _call_now(name: str, function: Callable[..., None], *tensors: Tensor) -> None:
    function(*tensors)


_host_call: ContextVar[Callable[..., None]] = ContextVar("host_call", default=_call_now)


@contextmanager
def recording_host_calls(record: Callable[..., None]) -> Iterator[None]:
    """Has `record(name, function, *tensors)` called meanwhile for what sets generators within a step."""
    token = _host_call.set(record)
    try:
        yield
    finally:
        _host_call.reset(token)


@functools.cache
def _entering(rank: int) -> Callable[[Tensor], None]:
    return functools.partial(_enter_rank_stream, rank)


def _enter_rank_stream(rank: int, drawn: Tensor) -> None:
    gpu = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    _shared_states.append((torch.get_rng_state(), gpu))
    torch.manual_seed(rank_seed(int(drawn), rank=rank))


def _return_to_shared_stream() -> None:
    cpu, gpu = _shared_states.pop()
    torch.set_rng_state(cpu)
    if gpu is not None:
        torch.cuda.set_rng_state(gpu)


def begin_rank_stream() -> RankStream | None:
    """Begins a stretch in which ranks draw different numbers; None where they do so anyway."""
    if _policy[0] == "independent":
        return None
    return RankStream(backends.current().rank)


# State: of all generators together, in memory and as JSON.


def generators_state(device: torch.device) -> dict[str, Any]:
    """Returns the state of Python's, NumPy's and torch's generators; of a GPU's too when `device` is one."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(legacy=True), "torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_generators_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Sets all generators to a state that `generators_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def capture_rng_state(device: torch.device) -> dict[str, Any]:
    """Returns the state of all generators as JSON values, for a checkpoint: about 10 kB.

    Args:
        device: Of this rank; the generator of a GPU is included.
    """
    # The keys are those of checkpoints: renaming one would make a new format.
    state = generators_state(device)
    version, integers, gauss = state["python"]
    name, keys, position, has_gauss, cached = state["numpy"]
    captured = {
        "python": {"version": version, "words": _as_text(np.array(integers, dtype="<u4").tobytes()), "gauss": gauss},
        "numpy": {
            "name": str(name),
            "keys": _as_text(np.asarray(keys, dtype="<u4").tobytes()),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
    }
    return captured | {kind: _as_text(state[kind].numpy().tobytes()) for kind in ("torch", "cuda") if kind in state}


def restore_rng_state(captured: Mapping[str, Any], device: torch.device) -> None:
    """Sets all generators to a captured state; a GPU's that had none is seeded from the rest of it.

    Args:
        captured: What `capture_rng_state` returned, perhaps on another kind of device.
        device: Of this rank.

    Raises:
        ValueError: The state is malformed; some generators may be set already.
    """
    # What concerns CUDA here follows torch's documentation: the tests run on machines without a GPU.
    try:
        of_python, of_numpy = captured["python"], captured["numpy"]
        integers = np.frombuffer(_as_bytes(of_python["words"]), dtype="<u4").tolist()
        keys = np.frombuffer(_as_bytes(of_numpy["keys"]), dtype="<u4")
        state: dict[str, Any] = {
            "python": (of_python["version"], tuple(integers), of_python["gauss"]),
            "numpy": (of_numpy["name"], keys, of_numpy["position"], of_numpy["has_gauss"], of_numpy["cached"]),
        }
        state |= {kind: _as_tensor(captured[kind]) for kind in ("torch", "cuda") if kind in captured}

        set_generators_state(state, device)
        if device.type == "cuda" and "cuda" not in captured:
            seed = _seed_of(rng_state_digest(captured))
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"the state of the random number generators is malformed: {error}.") from error


def rng_state_digest(captured: Mapping[str, Any]) -> str:
    """Returns 16 hexadecimal digits, equal for two ranks that are at the same point of the same stream."""
    return hashlib.sha256(json.dumps(captured, sort_keys=True).encode()).hexdigest()[:16]


def _as_text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _as_bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _as_tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(_as_bytes(text)), dtype=torch.uint8)


# Setup of guides: what it draws must not shift what a resumed run draws.


def preserve_rng_during_setup(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Makes guides that have not been called yet leave the generators as they are when they set themselves up.

    An autoguide draws a prototype trace at its first call. The run that was saved had drawn it long before, so a
    resumed run that drew it after its generators were restored would continue with other numbers.

    Args:
        modules: Those among them, or in them, that are autoguides.
        device: Of this rank.
    """
    for module in modules:
        for inner in module.modules():
            is_fresh = isinstance(inner, AutoGuide) and inner.prototype_trace is None
            if is_fresh and "_setup_prototype" not in vars(inner):
                object.__setattr__(inner, "_setup_prototype", _preserving_setup(inner, device))


def _preserving_setup(guide: AutoGuide, device: torch.device) -> Callable[..., Any]:
    """Returns what replaces the guide's `_setup_prototype` for one call."""

    def set_up(*args: Any, **kwargs: Any) -> Any:
        state = generators_state(device)
        vars(guide).pop("_setup_prototype", None)  # the method of the class is then found again
        try:
            return guide._setup_prototype(*args, **kwargs)
        finally:
            set_generators_state(state, device)

    return set_up

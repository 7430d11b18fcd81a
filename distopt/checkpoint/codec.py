"""Nested state as JSON beside tensors: what `state_dict()` methods return, exactly, and nothing that would be code."""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from distopt.checkpoint.errors import CheckpointError, CorruptCheckpointError

Json = Any
Place: TypeAlias = tuple[Any, Any]
"""Where in the state a value is: (place of what holds it, its key there); a text is made of it only when needed."""


class Keeper(Protocol):
    """Takes the tensors that `encode` finds."""

    def put(self, tensor: Tensor, where: Place) -> Json:
        """Keeps a tensor that was found at a place, and returns what stands for it in the JSON."""

    def put_alike(self, tensors: list[Tensor]) -> Json | None:
        """Keeps small tensors of one kind and shape, and returns what stands for one; None for others, not kept."""


Get = Callable[[Json], Tensor]
"""Returns the tensor that such a stand-in means."""

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
        torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
        torch.float8_e4m3fn, torch.float8_e5m2,
    )
}  # fmt: skip
_PLAIN = frozenset({type(None), bool, int, str})
_RUN = 4  # from so many tensors on, a list is looked at as a whole
MAX_RUN = 1_000_000


def path_of(where: Place) -> str:
    """Returns a place as text.

    Example:
        >>> path_of((((None, "replicated"), "params"), 3))
        'replicated/params/3'
    """
    parent, key = where
    return str(key) if parent is None else f"{path_of(parent)}/{key}"


class NoTensors:
    """A `Keeper` for places where tensors have none."""

    def put(self, tensor: Tensor, where: Place) -> Json:
        """Refuses."""
        raise CheckpointError(f"{path_of(where)}: a tensor has no place here; extras keep tensors.")

    def put_alike(self, tensors: list[Tensor]) -> None:
        """Leaves them to `put`."""

    def get(self, note: Json) -> Tensor:
        """Refuses what `put` cannot have written."""
        raise CorruptCheckpointError(f"a tensor where there should be none: {note!r}.")


def encode(value: Any, keeper: Keeper, where: Place) -> Json:
    """Returns `value` as JSON; tensors go to `keeper`.

    JSON has no tuples, infinities or dicts with other keys than strings: these become objects with one key that begins
    with `$`. Python, numpy and torch scalars, sequences, mappings, sets, bytes, dtypes and devices are known.

    Raises:
        CheckpointError: for a value of any other type, naming its place.
    """
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is Tensor or kind is nn.Parameter:
        return keeper.put(value, where)
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    # Most values are plain: not calling for these halves the time.
    if kind is dict:
        if _is_object(tuple(value)):
            return {
                key: item
                if (of := type(item)) in _PLAIN
                else keeper.put(item, (where, key))
                if of is Tensor
                else encode(item, keeper, (where, key))
                for key, item in value.items()
            }
        return {"$dict": _encode_pairs(value, keeper, where)}
    if kind is list:
        may_run = _RUN <= len(value) <= MAX_RUN and type(value[0]) is Tensor
        if may_run and (alike := keeper.put_alike(value)) is not None:
            return {"$run": [len(value), alike]}
        return [
            item if type(item) in _PLAIN else encode(item, keeper, (where, index)) for index, item in enumerate(value)
        ]
    if kind is tuple:
        return {"$tuple": encode(list(value), keeper, where)}
    return _encode_rare(value, keeper, where)


@lru_cache(maxsize=1024)
def _is_object(keys: tuple[Any, ...]) -> bool:
    """Can JSON's objects have these keys? Optimizers' states have the same ones over and over."""
    return all(type(key) is str and key[:1] != "$" for key in keys)


def _encode_pairs(value: Mapping[Any, Any], keeper: Keeper, where: Place) -> Json:
    return [[encode(key, keeper, where), encode(item, keeper, (where, key))] for key, item in value.items()]


def _encode_rare(value: Any, keeper: Keeper, where: Place) -> Json:
    if isinstance(value, Tensor):
        return keeper.put(value, where)
    if isinstance(value, np.generic):
        return encode(value.item(), keeper, where)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return {"$array": keeper.put(torch.from_numpy(np.ascontiguousarray(value)), where)}
    for kind, tag in ((OrderedDict, "$ordered"), (Counter, "$counter")):
        if type(value) is kind:
            return {tag: _encode_pairs(value, keeper, where)}
    if type(value) in (set, frozenset):
        return {"$set" if type(value) is set else "$frozenset": encode(sorted(value, key=repr), keeper, where)}
    if isinstance(value, (bytes, bytearray)):
        return {"$bytes": base64.b64encode(value).decode()}
    if type(value) is complex:
        return {"$complex": [repr(value.real), repr(value.imag)]}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.Size):
        return {"$size": list(value)}
    if isinstance(value, torch.device):
        return {"$device": str(value)}
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    raise CheckpointError(
        f"{path_of(where)}: a {name} cannot be saved. Checkpoints hold tensors, numbers, strings, lists, tuples, dicts "
        "and sets: let its state_dict() return these."
    )


_DECODERS: dict[str, Callable[[Any, Get], Any]] = {
    "$tuple": lambda value, get: tuple(decode(value, get)),
    "$float": lambda value, get: float(value),
    "$dict": lambda value, get: dict(_pairs(value, get)),
    "$ordered": lambda value, get: OrderedDict(_pairs(value, get)),
    "$counter": lambda value, get: Counter(dict(_pairs(value, get))),
    "$set": lambda value, get: set(decode(value, get)),
    "$frozenset": lambda value, get: frozenset(decode(value, get)),
    "$bytes": lambda value, get: base64.b64decode(value, validate=True),
    "$complex": lambda value, get: complex(float(value[0]), float(value[1])),
    "$dtype": lambda value, get: DTYPES[value],
    "$size": lambda value, get: torch.Size(value),
    "$device": lambda value, get: torch.device(value),
    "$array": lambda value, get: get(value).numpy(),
    "$run": lambda value, get: _run(value, get),
}


def decode(value: Json, get: Get) -> Any:
    """Returns what `encode` was given.

    Raises:
        CorruptCheckpointError: for JSON that `encode` does not write.
    """
    if isinstance(value, list):
        return [decode(item, get) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if tag == "$t":
        return get(value)
    if not tag.startswith("$"):
        return {key: decode(item, get) for key, item in value.items()}
    if tag not in _DECODERS or len(value) != 1:
        raise CorruptCheckpointError(f"state with the unknown tag {tag!r}; a newer distopt may have written it.")
    try:
        return _DECODERS[tag](value[tag], get)
    except (TypeError, ValueError, KeyError, RuntimeError, IndexError) as error:
        raise CorruptCheckpointError(f"state with a malformed {tag!r}: {error}.") from error


def _pairs(value: Json, get: Get) -> Iterable[tuple[Any, Any]]:
    return [(decode(key, get), decode(item, get)) for key, item in value]


def _run(value: Json, get: Get) -> list[Tensor]:
    count, note = value
    if type(count) is not int or not 0 <= count <= MAX_RUN:
        raise ValueError(f"{count!r} tensors in one list; at most {MAX_RUN:,} are read")
    return [get(note) for _ in range(count)]


@dataclass(frozen=True)
class TensorNote:
    """What stands for a tensor in the JSON: `{"$t": "float32 3,4"}`, with `in` for one that has its own entry."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    entry: str | None = None
    """Its name in the safetensors file; None when it is packed with others of its dtype, in the order of the JSON."""
    on_accelerator: bool = False

    def as_json(self) -> dict[str, Json]:
        """Returns the stand-in."""
        text = f"{str(self.dtype)[6:]} {','.join(map(str, self.shape))}".rstrip()
        note: dict[str, Json] = {"$t": text}
        if self.entry is not None:
            note["in"] = self.entry
        if self.on_accelerator:
            note["on"] = "accelerator"
        return note

    @classmethod
    def from_json(cls, note: Json) -> TensorNote:
        """Returns the note that a stand-in means.

        Raises:
            CorruptCheckpointError: for anything else.
        """
        try:
            dtype, _, shape = note["$t"].partition(" ")
            lengths = tuple(int(length) for length in shape.split(",")) if shape else ()
            if min(lengths, default=0) < 0 or not isinstance(note.get("in", ""), str):
                raise ValueError("negative length or nameless entry")
            return cls(DTYPES[dtype], lengths, note.get("in"), note.get("on") == "accelerator")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CorruptCheckpointError(f"a tensor described as {note!r}: {error}.") from error

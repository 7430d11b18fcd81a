"""Nested state as JSON beside tensors: what `state_dict()` methods return, exactly, and nothing that would be code.

`encode` turns state into JSON and hands each tensor to a `TensorSink`, which answers with the note that stands for it;
`decode` turns the JSON back and asks for the tensor of each note. What JSON lacks (tuples, infinities, sets, dicts
whose keys are no strings) becomes an object with one key that begins with `$`, from a fixed list: whatever else a file
may hold is refused, and nothing in it can name a class or function.
"""

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

Json: TypeAlias = Any
Location: TypeAlias = tuple[Any, Any]
"""Where in the state a value is: (location of what holds it, its key there). It becomes text only when needed: most of
a state's values are never named."""


class TensorSink(Protocol):
    """Takes the tensors that `encode` finds."""

    def put(self, tensor: Tensor, location: Location) -> Json:
        """Takes a tensor, and returns the note that stands for it in the JSON."""

    def put_uniform(self, tensors: list[Tensor]) -> Json | None:
        """Takes small tensors of one kind and shape, and returns the note of one; None if they are others."""


Get: TypeAlias = Callable[[Json], Tensor]
"""Returns the tensor that a note stands for."""

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
        torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
        torch.float8_e4m3fn, torch.float8_e5m2,
    )
}  # fmt: skip
_PLAIN = frozenset({type(None), bool, int, str})
_RUN = 4  # a list of at least this many tensors is looked at as a whole
MAX_RUN = 1_000_000


def path_of(location: Location) -> str:
    """Returns a location as text.

    Example:
        >>> path_of((((None, "replicated"), "params"), 3))
        'replicated/params/3'
    """
    parent, key = location
    return str(key) if parent is None else f"{path_of(parent)}/{key}"


class NoTensors:
    """A `TensorSink` for state that must not hold tensors."""

    def put(self, tensor: Tensor, location: Location) -> Json:
        """Refuses."""
        raise CheckpointError(
            f"{path_of(location)}: a tensor cannot be saved here; pass Checkpointer an object whose state has it."
        )

    def put_uniform(self, tensors: list[Tensor]) -> None:
        """Leaves them to `put`."""

    def get(self, note: Json) -> Tensor:
        """Refuses what `put` cannot have written."""
        raise CorruptCheckpointError(f"a tensor where there should be none: {note!r}.")


def encode(value: Any, sink: TensorSink, location: Location) -> Json:
    """Returns `value` as JSON.

    Python's, NumPy's and torch's scalars, sequences, mappings, sets, bytes, dtypes and devices are known.

    Args:
        value: Nested state.
        sink: Takes its tensors.
        location: Of `value`, for errors and names of tensors.

    Raises:
        CheckpointError: A value is of another type; the message has its path.
    """
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is Tensor or kind is nn.Parameter:
        return sink.put(value, location)
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}

    # Most values are plain, and most containers dicts with plain values. Looking at the items' types here, instead of
    # calling `encode` for each, halves the time.
    if kind is dict:
        if _is_object(tuple(value)):
            return {
                key: item
                if (of := type(item)) in _PLAIN
                else sink.put(item, (location, key))
                if of is Tensor
                else encode(item, sink, (location, key))
                for key, item in value.items()
            }
        return {"$dict": _encode_pairs(value, sink, location)}
    if kind is list:
        may_run = _RUN <= len(value) <= MAX_RUN and type(value[0]) is Tensor
        if may_run and (note := sink.put_uniform(value)) is not None:
            return {"$run": [len(value), note]}
        return [
            item if type(item) in _PLAIN else encode(item, sink, (location, index)) for index, item in enumerate(value)
        ]
    if kind is tuple:
        return {"$tuple": encode(list(value), sink, location)}
    return _encode_rare(value, sink, location)


@lru_cache(maxsize=1024)
def _is_object(keys: tuple[Any, ...]) -> bool:
    """Returns whether JSON's objects can have these keys; optimizers' states have the same ones over and over."""
    return all(type(key) is str and key[:1] != "$" for key in keys)


def _encode_pairs(value: Mapping[Any, Any], sink: TensorSink, location: Location) -> Json:
    return [[encode(key, sink, location), encode(item, sink, (location, key))] for key, item in value.items()]


def _encode_rare(value: Any, sink: TensorSink, location: Location) -> Json:
    if isinstance(value, Tensor):
        return sink.put(value, location)
    if isinstance(value, np.generic):
        return encode(value.item(), sink, location)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return {"$array": sink.put(torch.from_numpy(np.ascontiguousarray(value)), location)}

    for kind, tag in ((OrderedDict, "$ordered"), (Counter, "$counter")):
        if type(value) is kind:  # and no subclass, which could not be made again
            return {tag: _encode_pairs(value, sink, location)}
    if type(value) in (set, frozenset):
        return {"$set" if type(value) is set else "$frozenset": encode(sorted(value, key=repr), sink, location)}
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
        f"{path_of(location)}: a {name} cannot be saved. Checkpoints hold tensors, numbers, strings, lists, tuples, "
        "dicts and sets: let its state_dict() return these."
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
        CorruptCheckpointError: It is not JSON that `encode` writes.
    """
    if isinstance(value, list):
        return [decode(item, get) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if tag == "$t":  # the most frequent tag by far
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
    """What stands for a tensor in the JSON: `{"$t": "float32 3,4"}`, with `in` for one that has its own entry.

    Example:
        >>> TensorNote(torch.float32, (3, 4), "replicated/params/x/value").as_json()
        {'$t': 'float32 3,4', 'in': 'replicated/params/x/value'}
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    entry: str | None = None
    """Its name in the safetensors file; None when it is packed with others of its dtype, in the order of the JSON."""
    on_accelerator: bool = False
    """Whether it was on the accelerator of the run that saved it."""

    def as_json(self) -> dict[str, Json]:
        """Returns the note as JSON."""
        text = f"{str(self.dtype)[6:]} {','.join(map(str, self.shape))}".rstrip()
        note: dict[str, Json] = {"$t": text}
        if self.entry is not None:
            note["in"] = self.entry
        if self.on_accelerator:
            note["on"] = "accelerator"
        return note

    @classmethod
    def from_json(cls, note: Json) -> TensorNote:
        """Returns the note that `as_json` gave.

        Raises:
            CorruptCheckpointError: It is something else.
        """
        try:
            dtype, _, shape = note["$t"].partition(" ")
            lengths = tuple(int(length) for length in shape.split(",")) if shape else ()
            if min(lengths, default=0) < 0 or not isinstance(note.get("in", ""), str):
                raise ValueError("negative length or nameless entry")
            return cls(DTYPES[dtype], lengths, note.get("in"), note.get("on") == "accelerator")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CorruptCheckpointError(f"a tensor described as {note!r}: {error}.") from error

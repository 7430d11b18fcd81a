"""The manifest: what a checkpoint consists of, written last, so that its presence says that all the rest is there.

It is JSON that carries its own SHA-256, and holds the size and digests of every other file. So a checkpoint is whole if
its manifest is, and if its files are what the manifest says.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from numbers import Integral, Real
from pathlib import PurePath
from typing import Any

from distopt.checkpoint.errors import CheckpointError, CorruptCheckpointError, UnreadableCheckpointError
from distopt.run_files import MANIFEST

FORMAT = 4
"""What is written. A checkpoint that older code would read wrongly has another number."""
FORMAT_3 = 3
READABLE = (FORMAT_3, FORMAT)
"""What is read; `format_3` has the differences."""

DIGEST = "xxh3_128"
"""What the files' chunks are hashed with: as fast as memory, and blind to no damage; forgers are not its concern."""
MAX_MANIFEST_BYTES = 16 << 20
MAX_FILES = 20_000

CHUNK_BYTES = 8 << 20
"""Each file is hashed in pieces of this size: in parallel when all is read, alone when a few rows are."""

_FILE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
_ATTEMPT = re.compile(r"[0-9a-f]{8,32}")
_CHUNK = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class FileRecord:
    """One file: its size and the XXH3-128 of each `CHUNK_BYTES` of it, in order (an empty file has none)."""

    size: int
    chunks: tuple[str, ...]

    @classmethod
    def from_json(cls, value: Any) -> FileRecord:
        """Returns the record that `value` describes.

        Raises:
            ValueError: It is something that `as_json` cannot have written.
        """
        if not isinstance(value, dict) or value.keys() != {"size", "chunks"}:
            raise ValueError("a file's record is not {size, chunks}")
        size = value["size"]
        chunks = value["chunks"]
        if type(size) is not int or size < 0 or not isinstance(chunks, list):
            raise ValueError("a file's size is not a natural number, or its digests are no list")

        # A negative size or too many digests would make a reader ask for bytes that are not there.
        if len(chunks) != -(-size // CHUNK_BYTES):
            raise ValueError(f"a file of {size} bytes has {len(chunks)} digests")
        if not all(isinstance(chunk, str) and _CHUNK.fullmatch(chunk) for chunk in chunks):
            raise ValueError("a file's digest is not XXH3-128 in hexadecimal")
        return cls(size, tuple(chunks))

    def as_json(self) -> dict[str, Any]:
        """Returns the record as JSON values."""
        return {"size": self.size, "chunks": list(self.chunks)}


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is: everything here is small and can be read without touching a tensor."""

    step: int
    attempt: str
    """Unique for each try at saving; files of another try never mix in."""
    generation: int
    """Grows when a run goes back to an older step; the newest checkpoint is the highest (generation, step)."""
    world_size: int
    files: Mapping[str, FileRecord]
    progress: Any = None
    config: Any = None
    about: Mapping[str, Any] = field(default_factory=dict)
    """Versions, backend, device, time of writing; of each rank the digest of its random number generators (`rng`) and
    how many datapoints of each sharded plate it has (`plates`)."""
    format: int = FORMAT

    @property
    def size_bytes(self) -> int:
        """Bytes of all files, without the manifest itself."""
        return sum(record.size for record in self.files.values())

    def encode(self) -> bytes:
        """Returns the bytes of `manifest.json`.

        Raises:
            CheckpointError: It would be larger than what is read.
        """
        if len(self.files) > MAX_FILES:
            raise CheckpointError(f"step {self.step} has {len(self.files):,} files, a checkpoint holds {MAX_FILES:,}.")
        body = asdict(self) | {
            "digest": DIGEST,
            "files": {name: record.as_json() for name, record in self.files.items()},
        }
        raw = seal(body)
        if len(raw) > MAX_MANIFEST_BYTES:
            raise CheckpointError(
                f"step {self.step} has a manifest of {len(raw):,} bytes, {MAX_MANIFEST_BYTES:,} are read at most: its "
                "progress or its config is too large"
            )
        return raw

    @classmethod
    def decode(cls, raw: bytes, where: str) -> Manifest:
        """Returns the manifest whose `encode` gave `raw`.

        Args:
            raw: All bytes of the file.
            where: Its path, for errors.

        Raises:
            CorruptCheckpointError: A single bit differs, or a value cannot be what it should be.
            UnreadableCheckpointError: It is undamaged, and of a format that this version does not read.
        """
        body = unseal(raw, where)
        written = (body.get("format"), body.get("digest"))
        if written[0] not in READABLE or written[1] != DIGEST:
            raise UnreadableCheckpointError(
                f"{where}: format {written[0]!r} with digests {written[1]!r}; this distopt reads formats "
                f"{' and '.join(map(str, READABLE))} with {DIGEST}. Another version of distopt has written it, and can "
                "read it: nothing is deleted or replaced. Resume with that version, or begin in another folder."
            )
        try:
            return cls._from_body(body)
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptCheckpointError(f"{where}: {error}. It was not written by distopt, or was edited.") from error

    @classmethod
    def _from_body(cls, body: dict[str, Any]) -> Manifest:
        for name in ("step", "generation", "world_size"):
            if type(body[name]) is not int or body[name] < (name == "world_size"):
                raise ValueError(f"{name} is {body[name]!r}")
        if not isinstance(body["attempt"], str) or not _ATTEMPT.fullmatch(body["attempt"]):
            raise ValueError(f"attempt is {body['attempt']!r}")
        if not isinstance(body["about"], dict) or not isinstance(body["files"], dict):
            raise ValueError("about or files is no object")

        # Names are checked before any of them becomes part of a path.
        files = {file_name(name): FileRecord.from_json(record) for name, record in body.pop("files").items()}
        if body["format"] == FORMAT_3 and "noise" in body["about"]:
            body["about"]["rng"] = body["about"].pop("noise")
        del body["digest"]
        return cls(files=files, **body)


def file_name(name: str) -> str:
    """Returns `name` if it is one that distopt gives to files: no folder, no leading dot, nothing to escape.

    Raises:
        ValueError: It is another name.
    """
    if not _FILE_NAME.fullmatch(name) or name == MANIFEST:
        raise ValueError(f"{name!r} is no file of a checkpoint")
    return name


def seal(body: Mapping[str, Any]) -> bytes:
    """Returns `body` as canonical JSON that carries its own SHA-256."""
    return _canonical({"body": body, "sha256": hashlib.sha256(_canonical(body)).hexdigest()})


def unseal(raw: bytes, where: str) -> dict[str, Any]:
    """Returns the body that `seal` was given.

    There is one way to write a body, so comparing the bytes with those that `seal` would write finds every change, and
    not only those of the text that was hashed.

    Raises:
        CorruptCheckpointError: `raw` is not byte for byte what `seal` returned.
    """
    # Before any of it takes shape in memory: as objects, a text needs many times its size.
    if len(raw) > MAX_MANIFEST_BYTES or raw.count(b'"chunks"') > MAX_FILES:
        raise CorruptCheckpointError(
            f"{where}: more than {MAX_MANIFEST_BYTES:,} bytes or {MAX_FILES:,} files, which is more than is read."
        )
    try:
        document = json.loads(raw)
        body = document["body"]
        whole = isinstance(body, dict) and raw == seal(body)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCheckpointError(f"{where}: not readable ({type(error).__name__}: {error}).") from error
    if not whole:
        raise CorruptCheckpointError(f"{where}: its checksum does not match, so its bytes were changed.")
    return dict(body)


def _canonical(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True, allow_nan=False).encode() + b"\n"


def config_as_json(config: Any, path: str = "config") -> Any:
    """Returns a configuration as JSON holds it: tuples as lists, numpy's numbers as Python's, paths as strings.

    Args:
        config: Nested mappings, sequences and plain values.
        path: The key of `config`, for errors.

    Raises:
        CheckpointError: A value is none of these; the message has its key.

    Example:
        >>> config_as_json({"clip": float("inf"), "sizes": ((1, 2), 3)})
        {'clip': 'inf', 'sizes': [[1, 2], 3]}
    """
    if isinstance(config, Mapping):
        return {str(key): config_as_json(value, f"{path}.{key}") for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [config_as_json(item, f"{path}[{index}]") for index, item in enumerate(config)]
    if config is None or isinstance(config, (bool, str)):
        return config
    if isinstance(config, Integral):
        return int(config)
    if isinstance(config, Real):
        return float(config) if math.isfinite(config) else repr(float(config))
    if isinstance(config, PurePath):
        return str(config)

    kind = f"{type(config).__module__}.{type(config).__qualname__}"
    raise CheckpointError(
        f"{path}: a {kind} cannot be recorded with a checkpoint; give numbers, strings, lists and dicts."
    )

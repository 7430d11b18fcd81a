"""What a checkpoint holds, in lines for people."""

from __future__ import annotations

import json
from collections.abc import Iterator

from distopt.checkpoint.errors import CheckpointError
from distopt.checkpoint.manifest import Manifest
from distopt.checkpoint.reader import CheckedFile, verify
from distopt.checkpoint.resume import choose
from distopt.checkpoint.storage import Storage, open_storage


def describe(place: str, *, tensors: bool = False) -> Iterator[str]:
    """Yields lines on each checkpoint at `place`, newest first; reads manifests and headers alone."""
    storage, found = choose(open_storage("."), place)
    for one in found:
        yield f"{storage.root}/{one.folder}"
        if one.manifest is None:
            yield f"  BROKEN: {one.error}"
            continue
        yield from _describe_manifest(one.manifest)
        for name in sorted(one.manifest.files):
            yield f"  {name}: {one.manifest.files[name].size:,} bytes"
            if tensors and name.endswith(".safetensors"):
                yield from _describe_tensors(storage, one.folder, name, one.manifest)


def check(place: str) -> Iterator[tuple[str, bool]]:
    """Yields one line per checkpoint at `place` and whether it is whole; reads every byte."""
    storage, found = choose(open_storage("."), place)
    for one in found:
        where = f"{storage.root}/{one.folder}"
        try:
            size = verify(storage, one.folder).size_bytes
        except (CheckpointError, OSError) as error:
            if one.folder not in storage.folders():
                continue  # its run has deleted it since
            yield f"BAD   {where}: {error}", False
        else:
            yield f"whole {where}: {size:,} bytes", True


def _describe_manifest(manifest: Manifest) -> Iterator[str]:
    about = {key: value for key, value in manifest.about.items() if key != "noise"}
    yield f"  step {manifest.step}, {manifest.world_size} rank(s), {manifest.size_bytes:,} bytes"
    for title, value in (("progress", manifest.progress), ("config", manifest.config), ("about", about or None)):
        if value is not None:
            yield f"  {title}: {json.dumps(value, sort_keys=True)}"


def _describe_tensors(storage: Storage, folder: str, name: str, manifest: Manifest) -> Iterator[str]:
    with CheckedFile(storage, folder, name, manifest.files[name], manifest) as file:
        entries, _ = file.header()
    for entry in entries.values():
        yield f"    {entry.name}: {entry.dtype} {list(entry.shape)}"

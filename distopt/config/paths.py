"""Paths in a configuration: on this machine's file systems, or a URL where only checkpoints are kept."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
"""How a URL begins; its first group is the scheme. Two characters at least, so that `c:/runs` is none."""

# `s3:/bucket` is what is left of `s3://bucket` when it has passed through a Path.
_MEANT_AS_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")

_CHAINED = re.compile(r"::[A-Za-z][A-Za-z0-9+.-]*:/")
"""What fsspec takes for a storage within another one, as `simplecache::s3://bucket`."""


def is_url(path: str | Path) -> bool:
    """Returns whether `path` names a storage by its scheme, such as `s3://bucket/run`.

    Example:
        >>> is_url("s3://bucket/run"), is_url("runs/a:b"), is_url("c:/runs")
        (True, False, False)
    """
    return isinstance(path, str) and URL.match(path) is not None


def url_meant_by(path: str | Path) -> str | None:
    """Returns the URL that a path is without one of its two slashes, as a `Path` of it is; None for another path.

    Example:
        >>> url_meant_by(Path("s3://bucket/run")), url_meant_by("s3://bucket/run"), url_meant_by("./s3:/bucket")
        ('s3://bucket/run', None, None)
    """
    match = _MEANT_AS_URL.match(str(path))
    if match is None or is_url(path):
        return None
    return f"{match[1]}://{str(path)[match.end() :].lstrip('/')}"


def local_path(path: str) -> str:
    """Returns a path with `~` expanded as a shell does.

    Raises:
        ValueError: It is empty, a URL, holds control characters, or names the home of an unknown user.

    Example:
        >>> local_path("runs/flights")
        'runs/flights'
        >>> local_path("s3://bucket/run")
        Traceback (most recent call last):
            ...
        ValueError: found the URL s3://bucket/run, expected a path of a file system that is mounted here
    """
    match = _MEANT_AS_URL.match(path)
    if match is not None:
        rest = path[match.end() :].lstrip("/")
        hint = f": write /{rest}" if match[1].lower() == "file" else " of a file system that is mounted here"
        raise ValueError(f"found the URL {path}, expected a path{hint}")
    return _expanded(path)


def run_folder(path: str) -> str:
    """Does what `local_path` does, and names the key that takes the URL of a run's checkpoints."""
    match = _MEANT_AS_URL.match(path)
    if match is not None and match[1].lower() != "file":
        url = path if is_url(path) else url_meant_by(path)
        raise ValueError(
            f"found the URL {path}, expected a folder: logs, metrics and the record of a run are files. Its "
            f"checkpoints alone go to a URL by checkpoint.directory: {url}"
        )
    return local_path(path)


def path_or_url(path: str) -> str:
    """Does what `local_path` does, but lets URLs pass.

    Raises:
        ValueError: As of `local_path`; or it is a URL that lacks one of its two slashes.
    """
    url = url_meant_by(path)
    if url is not None:
        raise ValueError(f"found {path}, which has one slash; write {url} for the URL")
    return path if is_url(path) and not _CHAINED.search(path) else _expanded(path)


def _expanded(path: str) -> str:
    if not path.strip():
        raise ValueError(f"found {path!r}, expected a path; write . for the current folder, or leave the key out")
    if path != path.strip():
        raise ValueError(f"found {path!r}, with spaces around it; write {path.strip()}")
    if _CHAINED.search(path):
        raise ValueError(f"found {path}, a chain of URLs, expected one path or URL")
    if path.startswith("$"):
        raise ValueError(f"found {path}: a variable of the environment is written ${{oc.env:NAME}} here")
    # Paths are printed, and written into shell scripts and manifests: control characters could hide what they are.
    if re.search(r"[\x00-\x1f\x7f]", path):
        raise ValueError("control characters are not allowed in a path")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = expanded.partition("/")[0]
        raise ValueError(f"found {path}, but {user} is not known here; a folder of that name is ./{path}")
    return expanded


def _as_string(path: Any) -> Any:
    return str(path) if isinstance(path, Path) else path


LocalPath: TypeAlias = Annotated[str, BeforeValidator(_as_string), AfterValidator(local_path)]
"""A file or folder; `~` is expanded, URLs are refused."""

RunFolder: TypeAlias = Annotated[
    Path,
    Field(strict=False),
    BeforeValidator(lambda path: Path(run_folder(str(path))) if isinstance(path, str | Path) else path),
]
"""The folder of a run, as a Path."""

PathOrUrl: TypeAlias = Annotated[str, BeforeValidator(_as_string), AfterValidator(path_or_url)]
"""A file or folder, or a URL of a storage for checkpoints."""

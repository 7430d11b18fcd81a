"""Which source files a run computes with, so that ranks can compare them: on hosts of their own these may differ."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

_INSTALLED = ("site-packages", "dist-packages")  # folders of libraries, of which releases are compared


def source_digests(modules: Iterable[str]) -> dict[str, str]:
    """Returns the SHA-256 of each source file that modules and the working folder bring, by the name of its module.

    These are, for each of `modules`, all files of its top-level package, imported or not, since a model may import
    another one when it is called; of a module that is in no package, the files beside it; and every module imported so
    far whose file is below the working folder.

    Args:
        modules: Imported modules by name; others are left out.

    Returns:
        A digest by dotted name, which is the same wherever the files are. Names are those that an import would use.
    """
    files: dict[str, Path] = {}
    for name in modules:
        if name in sys.modules:
            files |= _package_files(name)
    files |= _working_folder_files()

    digests = {}
    for name, path in sorted(files.items()):
        try:
            digests[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError:
            continue  # a module from an archive, or one whose file is gone: there is nothing to compare
    return digests


def differing_files(digests: list[dict[str, str]]) -> dict[str, list[str]]:
    """Returns the modules whose files differ between ranks, with each rank's digest.

    A module that only some ranks have is none of them: rank 0 alone may import what draws a figure.

    Args:
        digests: What `source_digests` returned on each rank.
    """
    shared = set.intersection(*map(set, digests))
    by_name = {name: [each[name] for each in digests] for name in sorted(shared)}
    return {name: values for name, values in by_name.items() if len(set(values)) > 1}


def _package_files(name: str) -> dict[str, Path]:
    package = name.partition(".")[0]
    top = sys.modules.get(package)
    if top is not None and hasattr(top, "__path__"):
        return {dotted: path for folder in top.__path__ for dotted, path in _walk(Path(folder), package)}

    file = getattr(top, "__file__", None)
    if file is None:
        return {}
    path = Path(file).resolve()
    beside = {} if _is_installed(path) else {each.stem: each for each in path.parent.glob("*.py")}
    return beside | {package: path}


def _walk(folder: Path, package: str) -> Iterator[tuple[str, Path]]:
    """Yields the source files of a package and of the packages in it; folders of data are not entered."""
    for path in sorted(folder.glob("*.py")):
        yield package if path.stem == "__init__" else f"{package}.{path.stem}", path
    for inner in sorted(folder.iterdir()) if folder.is_dir() else ():
        if (inner / "__init__.py").is_file():
            yield from _walk(inner, f"{package}.{inner.name}")


def _working_folder_files() -> dict[str, Path]:
    folder = Path.cwd()
    files = {}
    real_folders: dict[Path, Path] = {}  # a process has thousands of modules in some hundred folders
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is None or _is_installed(given := Path(file)):
            continue
        if given.parent not in real_folders:
            real_folders[given.parent] = given.parent.resolve()
        path = real_folders[given.parent] / given.name
        if name != "__main__" and path.is_relative_to(folder) and not _is_installed(path):
            files[name] = path
    return files


def _is_installed(path: Path) -> bool:
    """Returns whether a path is in an environment's folder of libraries, which may lie below the working folder."""
    return any(folder in path.parts for folder in _INSTALLED)

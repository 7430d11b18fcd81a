"""Prints what distopt needs at run time, with everything that this needs, at the versions installed here.

`make dist` makes the bill of materials of it, and `make audit` asks for known vulnerabilities.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def closure(root: str) -> dict[str, str]:
    """Returns the version of each package that `root` needs, without extras and what other platforms need."""
    versions: dict[str, str] = {}
    waiting = [root]
    while waiting:
        for text in distribution(waiting.pop()).requires or ():
            requirement = Requirement(text)
            name = canonicalize_name(requirement.name)
            if name in versions or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
                continue
            try:
                versions[name] = distribution(name).version
            except PackageNotFoundError as error:
                raise SystemExit(f"{name} is not installed here; make setup installs it") from error
            waiting.append(name)
    return versions


if __name__ == "__main__":
    for name, version in sorted(closure("distopt").items()):
        print(f"{name}=={version.partition('+')[0]}")  # what follows a + names a build, such as torch's for CPUs

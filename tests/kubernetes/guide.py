"""Reads docker/kubernetes: what its README says to run, and the objects that it says to apply."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docker/kubernetes"
README = (FOLDER / "README.md").read_text()


def objects() -> dict[str, dict[str, Any]]:
    """Returns the objects of all files as KIND/NAME."""
    files = sorted(FOLDER.glob("*.yaml"))
    documents = [object_ for path in files for object_ in yaml.safe_load_all(path.read_text())]
    return {f"{object_['kind']}/{object_['metadata']['name']}": object_ for object_ in documents}


def launches() -> list[str]:
    """Returns the guide's `distopt launch` commands, with the shell array filled in."""
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
    arrays = {
        name: values.replace("\n", " ") for name, values in re.findall(r"^(\w+)=\(([^)]*)\)", shell, re.MULTILINE)
    }
    lines = [line.partition("#")[0] for line in shell.splitlines() if line.startswith("distopt launch")]
    return [re.sub(r'"\$\{(\w+)\[@\]\}"', lambda match: arrays[match[1]], line) for line in lines]

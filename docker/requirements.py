"""Prints what distopt and the extras named on the command line require, one per line.

    python requirements.py mpi examples

Reads the pyproject.toml of the working directory. Images install these in a separate layer, which is rebuilt when
pyproject.toml changes and not after every edit of the code.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
print(*project["dependencies"], sep="\n")
for extra in sys.argv[1:]:
    print(*project["optional-dependencies"][extra], sep="\n")

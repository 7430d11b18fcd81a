"""Golden files, and runs that are really started."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.launch.launching import Launched

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="write the launcher's golden files anew")


@pytest.fixture
def golden(request) -> Callable[[str, str], None]:
    """Compares a text with a file in tests/launch/golden, or writes that file anew with --update-golden."""

    def compare(name: str, text: str) -> None:
        program = Path(sys.executable)
        for place, word in ((program, "PYTHON"), (program.parent, "BIN"), (Path.cwd(), "FOLDER")):
            text = text.replace(str(place), word)
        path = GOLDEN / name
        if request.config.getoption("--update-golden", default=False):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        assert text == path.read_text(), f"{name} differs; `make golden` writes it anew, if that is meant"

    return compare


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Launched]]:
    """Starts `distopt launch` in the test's folder; whatever still runs at the end of the test is killed."""
    running: list[Launched] = []

    def launched(*args: str, **options) -> Launched:
        running.append(Launched(tmp_path, *args, **options))
        return running[-1]

    yield launched
    for run in running:
        run.end()

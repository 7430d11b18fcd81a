"""The reference has every key of the YAML, every command, metric, exit code and variable of the environment."""

from __future__ import annotations

import ast
import importlib.util
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import distopt.launchers
from distopt.checkpoint.cli import app as checkpoint_app
from distopt.config import all_keys
from distopt.launch.cli import app
from distopt.launch.worker.processes import REQUESTS
from distopt.launchers import USAGE_ERROR
from distopt.train.measurements import Measurements

pytest.importorskip("sphinx", reason="the docs need Sphinx; make setup-dev installs it")
pytest.importorskip("prometheus_client", reason="its metrics are on a page; make setup-dev installs it")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The text of each page of the reference, with what is generated."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "docs"), *sys.path])
    import generated

    pages = {}
    for path in [*(ROOT / "docs/reference").glob("*.md"), ROOT / "docs/how-to/resume.md"]:
        source = [path.read_text()]
        generated.insert_generated(None, path.stem, source)
        assert "<!-- generated" not in source[0], path
        pages[path.stem] = source[0]
    return pages


def commands_of(group: Any, name: str) -> list[tuple[str, list[str]]]:
    """Returns every command with its options."""
    if hasattr(group, "commands"):
        return [each for sub, command in group.commands.items() for each in commands_of(command, f"{name} {sub}")]
    return [(name, [option for param in group.params for option in param.opts if option.startswith("--")])]


def test_every_key_of_the_yaml_is_there(reference: dict[str, str]) -> None:
    for key in all_keys():
        if not key.is_section:
            assert f"\n`{key.name}`\n: " in reference["config"], key.name


def test_every_command_and_option_is_there(reference: dict[str, str]) -> None:
    commands = commands_of(typer.main.get_command(app), "distopt")
    commands += commands_of(typer.main.get_command(checkpoint_app), "distopt checkpoint")
    assert len(commands) > 12
    for name, options in commands:
        if name == "distopt checkpoint":  # hands its arguments on
            continue
        section = reference["cli"].split(f"\n## `{name}`\n")[1].split("\n## ")[0]
        assert all(f"`{option}" in section or f", {option}" in section for option in options if option != "--help")


def test_every_variable_of_the_environment_is_there(reference: dict[str, str]) -> None:
    sources = [*(ROOT / "distopt").rglob("*.py"), *(ROOT / "launch").rglob("*.py"), *(ROOT / "docker").iterdir()]
    text = "\n".join(path.read_text() for path in sources if path.is_file())
    names = set(re.findall(r"\bDISTOPT_[A-Z_]*[A-Z]\b", text))
    assert len(names) > 10
    assert [name for name in sorted(names) if f"| `{name}` |" not in reference["environment"]] == []
    for launcher in distopt.launchers.LAUNCHERS:
        assert f"| {launcher.name} |" in reference["environment"]


def test_every_exit_code_is_there(reference: dict[str, str]) -> None:
    codes = {0, 1, USAGE_ERROR, *(128 + number for number in REQUESTS)}
    assert {128 + signal.SIGTERM, 128 + signal.SIGINT} < codes
    assert [code for code in sorted(codes) if f"| `{code}` |" not in reference["exit-codes"]] == []


def test_every_logged_value_is_there(reference: dict[str, str]) -> None:
    measurements = Measurements(None, 0, 1)
    measurements.add({"elbo": 1.0})
    names = {*measurements.close(), "step", "gradient_norm", "skipped_steps", "lr"}
    names |= set(Measurements(None, 0, None).close())  # of a script that does not know its rows
    assert [name for name in sorted(names) if f"| `{name}` |" not in reference["metrics"]] == []
    assert "`distopt_steps_total`" in reference["metrics"]


def test_every_error_is_there(reference: dict[str, str]) -> None:
    sources = [*(ROOT / "distopt").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]
    names = {
        name
        for path in sources
        for name in re.findall(r"^class ([A-Z]\w*Error|LaunchRefused)\(", path.read_text(), re.M)
    }
    assert len(names) > 15
    # These never leave what raises them.
    internal = {"CollectiveCalledError", "NoGraphError", "NotCompiledError", "NotFiniteError", "ProbeError"}
    assert [name for name in sorted(names - internal) if f"| `{name}` |" not in reference["errors"]] == []


def test_what_other_programs_become_names_keys_and_classes_that_are_there() -> None:
    page = (ROOT / "docs/coming-from.md").read_text()
    keys = {key.name for key in all_keys()}
    named = set(re.findall(r"`((?:train|optim|reduce|checkpoint|log|launch|data)\.[a-z_.]+)(?=[:`])", page))
    assert len(named) > 8 and named <= keys, named - keys

    for name in set(re.findall(r"`?(distopt(?:\.[A-Za-z_]+)+)", page)):
        *parents, last = name.split(".")
        module = importlib.import_module(".".join(parents))
        assert hasattr(module, last) or importlib.util.find_spec(name) is not None, name


def test_every_key_either_may_change_on_a_resume_or_may_not(reference: dict[str, str]) -> None:
    may, _, may_not = reference["resume"].partition("These may not:")
    assert "`train.num_steps`" in may and "`launch`" in may
    assert "`train.loss`" in may_not and "`seed`" in may_not and "`launch.workers`" not in may_not


def text_of_literals() -> str:
    """Returns all strings of the code, one a line; what an f-string fills in is `...`."""
    lines = []
    for path in [*(ROOT / "distopt").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            pieces = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [str(piece.value) if isinstance(piece, ast.Constant) else "..." for piece in pieces]
            if isinstance(node, ast.JoinedStr | ast.Constant):
                lines.append(" ".join("".join(texts).split()))
    return "\n".join(lines)


def test_messages_of_troubleshooting_are_those_of_the_code() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    text = text_of_literals()
    cells = [line.split(" | ")[0].removeprefix("| ") for line in page.splitlines() if line.startswith("| ")]
    quoted = [message for cell in cells for message in re.findall(r"`([^`]+ [^`]+ [^`]+)`", cell)]
    pieces = [(message, piece.strip()) for message in quoted for piece in message.split("...")]
    assert len(quoted) > 12
    assert [message for message, piece in pieces if piece not in text] == []

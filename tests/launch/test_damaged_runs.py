"""Every command over runs whose files are damaged, of another kind or gone: an answer or a sentence, no traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from distopt.checkpoint.cli import app as checkpoint_app
from distopt.launch.cli import app
from distopt.launch.ui import Pages
from distopt.run_files import read_metrics
from distopt.train import load_run
from tests.train.runs import config, run_here

HUGE = "9" * 5000
FILES = ("metrics.jsonl", "run.json", "launch.json", "launch.lock", "config.yaml", "report.html")
LOG_FILES = ("logs/rank-0.log", "logs/rank-0.jsonl")
FOLDERS = ("tensorboard", "logs", "checkpoints", "checkpoints/step-00000020", "checkpoints/step-00000020/manifest.json")


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write(path: Path, content: bytes) -> None:
    remove(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def make_folder(path: Path) -> None:
    remove(path)
    path.mkdir(parents=True)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "not UTF-8": lambda path: write(path, b'\xff\xfe{"step": \x80}\n'),
    "cut": lambda path: write(path, (path.read_bytes() if path.is_file() else b'{"a": [')[:60]),
    "empty": lambda path: write(path, b""),
    "a list": lambda path: write(path, b"[1, 2]\n"),
    "a huge number": lambda path: write(path, f'{{"step": {HUGE}}}\n'.encode()),
    "not numbers": lambda path: write(path, b'{"step": 5, "elbo": NaN, "rows_per_s": -Infinity, "seconds": 1e999}\n'),
    "a folder": make_folder,
    "gone": remove,
}

COMMANDS = (
    ["status"],
    ["status", "runs/line"],
    ["status", "--json"],
    ["logs", "runs/line"],
    ["logs", "runs/line", "--all-ranks"],
    ["stop", "runs/line"],
    ["config", "diff", "line.yaml", "runs/line"],
    ["launch", "line.yaml", "--dry-run"],
    ["checkpoint", "inspect", "runs/line"],
    ["checkpoint", "verify", "runs/line"],
)
SLOW_COMMANDS = (["report", "runs/line"], ["compare", "runs/line", "runs/line"])


def answer(command: list[str]) -> tuple[int, str]:
    """Returns the exit status and the output; an error that is not told in words is raised."""
    group, *rest = command
    result = CliRunner().invoke(*((checkpoint_app, rest) if group == "checkpoint" else (app, command)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"{command}: {result.output}") from result.exception
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with a run that has ended, as `distopt launch` leaves it."""
    folder = tmp_path_factory.mktemp("finished")
    path = config(folder, run_dir="runs/line", train={"num_steps": 20}, launch={"workers": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_here(path)
    run_dir = folder / "runs" / "line"
    (run_dir / "logs").mkdir(exist_ok=True)
    for name in LOG_FILES:
        (run_dir / name).write_text('{"event": "x"}\n')
    (run_dir / "launch.json").write_text(json.dumps({"pid": 1, "host": "h", "status": 0, "platform": "local"}))
    (run_dir / "config.yaml").write_text(yaml.safe_dump(yaml.safe_load(path.read_text())))
    (run_dir / "launch.lock").write_text("")
    return folder


@pytest.fixture
def run_dir(finished, tmp_path, monkeypatch) -> Path:
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return Path("runs/line")


def check(commands) -> None:
    for command in commands:
        status, output = answer(command)
        assert status in (0, 1, 2), (command, output)
        assert status == 0 or output.strip() or command[:2] == ["config", "diff"], command
    for answer_of in Pages(lambda: [Path("runs/line")]).by_path().values():
        _, kind, body = answer_of({"run": "runs/line", "runs": "runs/line"})
        if kind == "application/json":
            json.loads(body, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_run_that_is_whole_is_answered_by_every_command(run_dir):
    assert [answer(command)[0] for command in (*COMMANDS, *SLOW_COMMANDS)] == [0] * 12


@pytest.mark.sampled(20)
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", (*FILES, *LOG_FILES))
def test_file_that_is_damaged_is_told_in_words(name, damage, run_dir):
    DAMAGE[damage](run_dir / name)
    check(COMMANDS)


@pytest.mark.parametrize("damage", DAMAGE)
def test_saved_run_is_read_whatever_its_metrics_are(damage, run_dir):
    DAMAGE[damage](run_dir / "metrics.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path.cwd()))
        saved = load_run("runs/line")
        assert all(isinstance(row["step"], int) for row in saved.history)


@pytest.mark.parametrize("damage", ["not UTF-8", "gone"])
@pytest.mark.parametrize("name", FOLDERS)
def test_folder_that_is_a_file_or_gone_is_told_in_words(name, damage, run_dir):
    DAMAGE[damage](run_dir / name)
    check(COMMANDS)


@pytest.mark.parametrize("name", [".", ".."])
@pytest.mark.parametrize("damage", ["not UTF-8", "gone", "a folder"])
def test_run_directory_that_is_none_is_told_in_words(name, damage, run_dir):
    DAMAGE[damage]((run_dir / name).resolve())
    check(COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", (*FILES, *LOG_FILES, *FOLDERS))
def test_report_and_comparison_of_a_damaged_run_are_told_in_words(name, damage, run_dir):
    DAMAGE[damage](run_dir / name)
    check(SLOW_COMMANDS)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"name: \x00x\n", b"", f"name: x\nseed: {HUGE}\n".encode(), b"[1]", None]
)
def test_yaml_that_cannot_be_read_is_told_in_words(content, run_dir):
    remove(Path("line.yaml"))
    if content is not None:
        write(Path("line.yaml"), content)
    for command in (["config", "show", "line.yaml"], ["launch", "line.yaml", "--dry-run"], ["train", "line.yaml"]):
        status, output = answer(command)
        assert status == 2 and output.startswith("line.yaml"), output


@pytest.mark.parametrize("value", [HUGE, f"-{HUGE}", f"0x{'f' * 5000}", "\udcff", "1e400"])
def test_override_that_is_no_number_of_use_is_told_in_a_short_line(value, run_dir):
    status, output = answer(["config", "show", "line.yaml", f"train.num_steps={value}"])
    assert status == 2 and len(output) < 300, output


def test_rows_after_a_cut_or_unreadable_line_of_the_metrics_are_kept(run_dir):
    rows = read_metrics(run_dir)
    metrics = run_dir / "metrics.jsonl"
    first, *others = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(first + b'{"step": 6, "el\n' + b"\xff\xfe\n" + b"".join(others))
    assert read_metrics(run_dir) == rows and len(rows) > 2


def test_letters_of_an_override_under_a_locale_of_ascii_are_those_that_were_typed(run_dir):
    typed = "\u00fc".encode().decode("ascii", errors="surrogateescape")
    status, output = answer(["config", "show", "line.yaml", f"run_dir=runs/{typed}"])
    assert status == 0 and "run_dir: runs/\u00fc" in output

"""`distopt ui`: a page about runs on loopback, made of what their directories hold; it only reads."""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

from distopt.config import ConfigError, checkpoints_of, differences, dump_yaml
from distopt.config.compare import ABSENT
from distopt.read_only_server import Answer, ReadOnlyServer, text_answer
from distopt.run_files import MANIFEST, checkpoints_in, read_facts, read_metrics, step_of

from . import runs
from .progress import progress_of
from .status import state_of, strict_json
from .worker.rank_log import log_of

PAGE = Path(__file__).with_name("ui.html")
MAX_POINTS = 1000  # of a curve; a screen shows no more
LOG_BYTES = 65536
STATE_S = 2.0
"""How long a state is kept, since a cluster is asked for it by a command."""

Find = Callable[[], Sequence[Path]]


class Pages:
    """What the page asks for.

    Args:
        find: Returns the directories of the runs; asked each time, so that a run that is started meanwhile appears.
    """

    def __init__(self, find: Find) -> None:
        self._find = find
        self._states: dict[Path, tuple[float, Any]] = {}
        self._nonce = secrets.token_urlsafe(16)

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every answer: the browser loads nothing from elsewhere, and no other page shows this one."""
        style_and_script = f"style-src 'nonce-{self._nonce}'; script-src 'nonce-{self._nonce}'"
        policy = f"default-src 'none'; {style_and_script}; connect-src 'self'; img-src data:; base-uri 'none'"
        return {
            "Content-Security-Policy": f"{policy}; form-action 'none'; frame-ancestors 'none'",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
        }

    def by_path(self) -> dict[str, Callable[[Mapping[str, str]], Answer]]:
        """Returns the pages by their paths."""
        return {
            "/": self.page,
            "/runs": self.runs,
            "/curves": self.curves,
            "/run": self.run,
            "/log": self.log,
            "/differences": self.differences,
        }

    def page(self, query: Mapping[str, str]) -> Answer:
        """The page itself."""
        text = PAGE.read_text(encoding="utf-8").replace("NONCE", self._nonce)
        return HTTPStatus.OK, "text/html; charset=utf-8", text.encode()

    def runs(self, query: Mapping[str, str]) -> Answer:
        """All runs with their states."""
        return _json([self._summary(each) for each in self._find()])

    def curves(self, query: Mapping[str, str]) -> Answer:
        """The metrics of some runs: by run and name, pairs of step and value."""
        chosen = set(query.get("runs", "").split(","))
        return _json({str(each): _curves(each) for each in self._find() if str(each) in chosen})

    def run(self, query: Mapping[str, str]) -> Answer:
        """One run: its YAML, facts, ranks and checkpoints."""
        run = self._named(query)
        if run is None:
            return _unknown(query)
        facts = read_facts(run)
        logs = [path.stem.removeprefix("rank-") for path in log_of(run, 0).parent.glob("rank-*.log")]
        return _json(
            {
                "config": _yaml(run),
                "facts": {key: value for key, value in facts.items() if key != "paces"},
                "paces": facts.get("paces", []),
                "checkpoints": _checkpoints(run),
                "ranks": sorted(int(each) for each in logs if each.isdecimal()),
            }
        )

    def log(self, query: Mapping[str, str]) -> Answer:
        """The end of a rank's log."""
        run, rank = self._named(query), query.get("rank", "0")
        if run is None or not rank.isdecimal() or len(rank) > 6:
            return _unknown(query)
        try:
            with log_of(run, int(rank)).open("rb") as file:
                size = file.seek(0, 2)
                file.seek(max(0, size - LOG_BYTES))
                text = file.read().decode(errors="replace")
        except OSError:
            text = ""
        return HTTPStatus.OK, "text/plain; charset=utf-8", text.encode()

    def differences(self, query: Mapping[str, str]) -> Answer:
        """The keys in which the YAML of some runs differ, with the value of each run."""
        chosen = set(query.get("runs", "").split(","))
        configs = {str(each): _config(each) for each in self._find() if str(each) in chosen}
        known = {name: config for name, config in configs.items() if config is not None}
        rows: dict[str, dict[str, Any]] = {}
        for name, config in known.items():
            first = next(iter(known.values()))
            for key, here, there in differences(first, config, ignore=("name", "run_dir")):
                rows.setdefault(key, dict.fromkeys(known, _shown(here)))[name] = _shown(there)
        return _json(rows)

    def _named(self, query: Mapping[str, str]) -> Path | None:
        """Returns a run by its directory; what is none of the runs is not read, whatever the path."""
        return next((each for each in self._find() if str(each) == query.get("run")), None)

    def _summary(self, run: Path) -> dict[str, Any]:
        state, progress = self._state(run), progress_of(run)
        facts = read_facts(run)
        return {
            "run": str(run),
            "name": run.name,
            "state": state.phase,
            "detail": state.detail,
            "progress": None if progress is None else progress.as_json(),
            "task": facts.get("task"),
            "num_workers": facts.get("num_workers"),
            "began_at": facts.get("began_at"),
            "straggler": facts.get("straggler"),
        }

    def _state(self, run: Path) -> Any:
        asked, state = self._states.get(run, (0.0, None))
        if state is None or time.monotonic() - asked > STATE_S:
            state = state_of(run)
            self._states[run] = (time.monotonic(), state)
        return state


def serve_page(find: Find, port: int, echo: Callable[[str], None]) -> None:
    """Serves the page until Ctrl-C.

    Raises:
        OSError: The port is taken.
    """
    pages = Pages(find)
    with ReadOnlyServer(pages.by_path(), port, headers=pages.headers) as server:
        echo(f"{server.url} shows the runs; Ctrl-C ends it")
        while True:
            time.sleep(3600)


def _curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns the metrics of a run, thinned to what a screen shows; the last row stays."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in read_metrics(run):
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(name, []).append((row["step"], value))
    return {name: _thinned(points) for name, points in curves.items()}


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    stride = -(-len(points) // MAX_POINTS)
    return points[:: max(1, stride)] + ([points[-1]] if stride > 1 and (len(points) - 1) % stride else [])


def _checkpoints(run: Path) -> list[dict[str, Any]]:
    """Returns step, time and size of the checkpoints, the newest first; none of those at a URL."""
    folder = checkpoints_of(run)
    saved: list[dict[str, Any]] = []
    for checkpoint in reversed(checkpoints_in(folder)) if isinstance(folder, Path) else ():
        try:
            sizes = [path.stat().st_size for path in checkpoint.iterdir()]
            saved_at = (checkpoint / MANIFEST).stat().st_mtime
        except OSError:  # deleted by the run in the meantime
            continue
        saved.append({"step": step_of(checkpoint.name), "saved_at": saved_at, "bytes": sum(sizes)})
    return saved


def _config(run: Path) -> dict[str, Any] | None:
    try:
        config = runs.launched_config(run).as_json()
    except ConfigError:
        return None
    config["launch"].pop("env", None)  # which may hold secrets
    return config


def _yaml(run: Path) -> str:
    try:
        config = runs.launched_config(run)
    except ConfigError as error:
        return str(error)
    return dump_yaml(config.model_copy(update={"launch": config.launch.model_copy(update={"env": {}})}))


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, str) or value is ABSENT else json.dumps(value)


def _json(value: Any) -> Answer:
    return HTTPStatus.OK, "application/json", strict_json(value).encode()


def _unknown(query: Mapping[str, str]) -> Answer:
    return text_answer(HTTPStatus.NOT_FOUND, f"no such run or rank: {query.get('run')}, {query.get('rank')}")

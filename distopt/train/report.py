"""The results of a run: tables on the terminal, and one HTML page with tables and figures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from distopt.train.monitor import RankPace, describe_straggler

MAX_RANKS = 8
"""Ranks in the table of paces."""

# The page must be readable from a mail or an artifact store, so style and figures are inside it.
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --quiet: #777; --paper: #fff; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { margin: 0 0 .3rem; } h2 { margin: 2.6rem 0 .6rem; font-size: 1.25rem; }
p.quiet, figcaption, caption { color: var(--quiet); font-size: .9rem; text-align: left; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6rem 0; }
th, td { padding: .22rem .9rem .22rem 0; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, .texts td { text-align: left; } th { font-weight: 600; }
.scroll { overflow-x: auto; }
caption { caption-side: bottom; padding-top: .4rem; }
figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; background: var(--paper); border-radius: 6px; }
pre { overflow-x: auto; padding: .8rem; border: 1px solid var(--line); border-radius: 6px; font-size: .85rem; }
"""


class Report:
    """Collects texts, tables and figures in the order in which they are added; texts and tables are printed at once.

    Args:
        title: Heading of the page.
        console: Where texts and tables are printed; None prints nothing.
        history: The rows of `metrics.jsonl`, oldest first, for a task that draws curves.

    Attributes:
        history: As given.

    Example:
        >>> report = Report("demo", Console(width=40))
        >>> report.text("Two groups were found.")
        Two groups were found.
    """

    def __init__(self, title: str, console: Console | None = None, history: Sequence[dict[str, Any]] = ()) -> None:
        self.history: list[dict[str, Any]] = list(history)
        self._title = title
        self._console = console
        self._sections: list[str] = []

    def heading(self, text: str) -> None:
        """Starts a section of the page."""
        self._sections.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str, *, quiet: bool = False) -> None:
        """Adds a paragraph; a quiet one is in small print and not printed on the terminal."""
        style = ' class="quiet"' if quiet else ""
        self._sections.append(f"<p{style}>{html.escape(text)}</p>")
        if self._console is not None and not quiet:
            self._console.print(text, highlight=False, markup=False)

    @property
    def num_sections(self) -> int:
        """How many texts, tables and figures have been added."""
        return len(self._sections)

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        note: str = "",
        *,
        printed: bool = True,
    ) -> None:
        """Adds a table of texts; the first column is aligned to the left, the others to the right as numbers are.

        Args:
            title: What the table shows, in a few words.
            columns: The headings of the columns; none for a table of facts, whose columns are all texts.
            rows: Each has one text per column.
            note: How to read the table; it is shown below.
            printed: Whether it is printed on the terminal, too.
        """
        head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
        kind, head = ("", f"<thead><tr>{head}</tr></thead>") if columns else (' class="texts"', "")
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
        caption = f"<caption>{html.escape(note)}</caption>" if note else ""
        self.heading(title)
        # A page that is wider than a phone is small print there, or scrolls with all of its text.
        self._sections.append(f'<div class="scroll"><table{kind}>{caption}{head}<tbody>{body}</tbody></table></div>')
        if self._console is None or not printed:
            return

        # Everything is a Text because rich would take [brackets] in plain strings for its markup.
        drawn = Table(title=Text(title), title_justify="left", caption=Text(note), caption_justify="left")
        for index, column in enumerate(columns):
            drawn.add_column(Text(column), justify="left" if index == 0 else "right")
        for row in rows:
            drawn.add_row(*map(Text, row))
        self._console.print(drawn)

    def figure(self, figure: Any, caption: str = "") -> None:
        """Adds a matplotlib figure, which becomes an SVG inside the page."""
        drawn = io.BytesIO()
        # Without a date, so that the same run gives the same page.
        figure.savefig(drawn, format="svg", bbox_inches="tight", metadata={"Date": None})
        source = base64.b64encode(drawn.getvalue()).decode()
        text = html.escape(caption)
        self._sections.append(
            f'<figure><img alt="{text}" src="data:image/svg+xml;base64,{source}">'
            f"<figcaption>{text}</figcaption></figure>"
        )

    def source(self, title: str, text: str) -> None:
        """Adds preformatted text, folded below its title; it is not printed on the terminal."""
        self._sections.append(
            f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>"
        )

    def write(self, path: Path) -> None:
        """Writes the page, which needs no other file to be shown."""
        title = html.escape(self._title)
        page = (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style></head>\n'
            f"<body><h1>{title}</h1>\n" + "\n".join(self._sections) + "\n</body></html>\n"
        )
        path.write_text(page, encoding="utf-8")


def paces_table(report: Report, paces: Sequence[RankPace]) -> None:
    """Adds a table of the slowest ranks, the slowest first, and the straggler if there is one."""
    # Of thousands of ranks only the slowest matter: those are the ranks that the others wait for.
    shown = sorted(paces, key=lambda pace: -pace.work_s)[:MAX_RANKS]
    rest = f" The {MAX_RANKS} slowest of {len(paces)} ranks." if len(paces) > MAX_RANKS else ""
    report.table(
        "Who waited for whom",
        ["rank", "on", "work for a step (ms)", "waiting for the others (ms)"],
        [[str(each.rank), each.host, f"{1e3 * each.work_s:.3g}", f"{1e3 * each.waiting_s:.3g}"] for each in shown],
        f"Means over the steps since the run was last started. Waiting includes sending the gradients.{rest}",
    )

    straggler = describe_straggler(paces)
    if straggler:
        report.text(straggler[0].upper() + straggler[1:] + ".")


def elbo_figure(history: Sequence[dict[str, Any]], num_rows: int | None) -> Any:
    """Returns a matplotlib figure of the ELBO against the step, per row where their number is known."""
    from matplotlib.figure import Figure

    points = [(row["step"], row["elbo"] / (num_rows or 1)) for row in history if row.get("elbo") is not None]
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots()
    if points:
        steps, elbo = zip(*points, strict=True)
        axes.plot(steps, elbo, linewidth=1.4, color="#2563a8")

        # The ELBO of the first steps is often a thousand times lower than the rest and would flatten the curve. The
        # lower limit is four times as far from the best value as the 10 % quantile of the last three quarters, so
        # that the climb leaves the figure at its lower edge.
        settled = sorted(elbo[len(elbo) // 4 :])
        top = max(elbo)
        axes.set_ylim(top - 4 * max(top - settled[len(settled) // 10], 1e-9), top + 0.3 * (top - settled[0]) + 1e-9)

    axes.set(xlabel="step", ylabel="ELBO (nats)" if num_rows is None else "ELBO per row (nats)")
    _finish(axes)
    return figure


def curves_figure(curves: Mapping[str, Sequence[tuple[int, float]]], label: str) -> Any:
    """Returns a matplotlib figure of curves over each other.

    Args:
        curves: (step, value) by name.
        label: Of the vertical axis.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        if points:
            axes.plot(*zip(*points, strict=True), linewidth=1.4, label=name)
    axes.set(xlabel="step", ylabel=label)
    if len(curves) > 1:
        axes.legend(frameon=False)
    _finish(axes)
    return figure


def points_figure(points: Sequence[tuple[float, float]], x_label: str, y_label: str) -> Any:
    """Returns a matplotlib figure of points; the horizontal axis is logarithmic where they span more than a decade."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots()
    horizontal = [x for x, _ in points]
    axes.plot(*zip(*points, strict=True), "o", color="#2563a8", alpha=0.7)
    if min(horizontal) > 0 and max(horizontal) > 10 * min(horizontal):
        axes.set_xscale("log")
    axes.set(xlabel=x_label, ylabel=y_label)
    _finish(axes)
    return figure


def params_figure(params: Mapping[str, Tensor]) -> Any:
    """Returns a matplotlib figure of the elements of each parameter, one line of dots for each.

    Args:
        params: Constrained and detached values by name.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.9 + 0.28 * len(params)), layout="constrained")
    axes = figure.subplots()
    for line, value in enumerate(params.values()):
        elements = value.reshape(-1).tolist()
        # A thousand dots lie over each other: as many, evenly chosen, show the same.
        chosen = elements[:: max(1, len(elements) // 300)]
        axes.plot(chosen, [line] * len(chosen), "o", color="#2563a8", alpha=0.45, markersize=4, markeredgewidth=0)
    axes.set_yticks(range(len(params)), list(params), fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="value")
    _finish(axes)
    return figure


def _finish(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from distopt.train.report import Report, elbo_figure

VOID = {"meta", "img"}


class Page(HTMLParser):
    """Checks that tags nest, and collects texts and what the page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.sources: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def write(report: Report, folder: Path) -> Page:
    path = folder / "report.html"
    report.write(path)
    return Page(path.read_text(encoding="utf-8"))


def test_page_needs_no_other_file_and_holds_what_was_added_in_order(tmp_path: Path) -> None:
    report = Report("flights")
    report.text("first")
    report.table("second", ["name", "minutes"], [["Delta", "-4.9"]], "a note")
    report.figure(elbo_figure([{"step": 1, "elbo": -5.0}, {"step": 2, "elbo": -4.0}], 1), "third")
    report.source("fourth", "a: 1\nb: 2")
    page = write(report, tmp_path)
    text = "".join(page.texts)
    order = [text.index(each) for each in ("first", "second", "a note", "Delta", "third", "fourth", "a: 1\nb: 2")]
    assert order == sorted(order)
    assert page.sources and all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)


def test_table_of_facts_has_no_headings_and_scrolls_alone_on_a_phone(tmp_path: Path) -> None:
    report = Report("facts")
    report.table("The run", [], [["began", "2026-01-02"], ["versions", "distopt 1, pyro 2"]], printed=False)
    write(report, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert '<div class="scroll"><table class="texts"><tbody><tr><td>began</td>' in page and "<th>" not in page


def test_text_of_the_task_cannot_become_markup(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script> & "quotes"'
    report = Report(evil)
    report.heading(evil)
    report.text(evil)
    report.table(evil, [evil], [[evil]], evil)
    report.source(evil, evil)
    page = write(report, tmp_path)
    assert "script" not in re.findall(r"<(\w+)", (tmp_path / "report.html").read_text())
    assert sum(evil in text for text in page.texts) == 10


def test_tables_are_printed_with_brackets_as_they_are() -> None:
    printed = io.StringIO()
    report = Report("flights", Console(file=printed, width=100))
    report.table("carriers", ["carrier", "minutes"], [["Hawaiian [HA]", "+0.7"]], "with [brackets]")
    assert "Hawaiian [HA]" in printed.getvalue() and "+0.7" in printed.getvalue()
    assert "with [brackets]" in printed.getvalue()


@pytest.mark.parametrize("elbo", [[], [None], [-5.0], [-5.0, None, -4.0], [-1e9, -5.0, -4.9, -4.8], [-4.0] * 8])
def test_elbo_is_drawn_whatever_was_logged(elbo: list[float | None], tmp_path: Path) -> None:
    figure = elbo_figure([{"step": step, "elbo": value} for step, value in enumerate(elbo)], 10)
    report = Report("x")
    report.figure(figure, "ELBO")
    (source,) = write(report, tmp_path).sources
    drawn = ElementTree.fromstring(base64.b64decode(source.partition(",")[2]))
    assert drawn.tag.endswith("svg")
    low, high = figure.axes[0].get_ylim()
    settled = [value / 10 for value in elbo[len(elbo) // 2 :] if value is not None]
    assert all(low <= value <= high for value in settled)

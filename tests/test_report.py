"""`hw3gpu verify --report`: one page with all outputs, well formed, that asks for nothing from elsewhere."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from hw3gpu.__main__ import main
from hw3gpu._cli import report
from hw3gpu._cli.verify import Check

RIGHT = Check("S4", "softmax", "Numba kernels", "numpy", "float32", "y N = 5", 1e-8, 2e-8, 3e-8, 0.25, "both", True)
WRONG = replace(RIGHT, kernels="Triton kernels", error=0.5, of_bound=4e4, held_by="neither", passed=False)
RAISED = replace(WRONG, output="", error=None, of_bound=None, note="ValueError: <a> & 'b'")


def parsed(page: str) -> ElementTree.Element:
    """The page as XML: all but the first line and the tags that HTML never closes is; the script holds '<' as text."""
    body = page.removeprefix("<!DOCTYPE html>\n")
    body = re.sub(r"<(meta [^>]*)>", r"<\1/>", re.sub(r"<script>.*</script>", "", body, flags=re.DOTALL))
    return ElementTree.fromstring(body.replace("<tr class=failed>", '<tr class="failed">'))


def cells(tree: ElementTree.Element) -> list[list[str]]:
    return [["".join(cell.itertext()) for cell in row] for row in tree.iter("tr")]


def test_the_page_has_every_check_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "report.html"
    assert main(["verify", "--kernels", "cpu", "--only", "S4", "S5", "--json", "--report", str(file)]) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    tree = parsed(file.read_text())
    heading, *rows = cells(tree)
    assert heading == list(report.COLUMNS)
    names = ("row", "operation", "kernels", "arrays", "dtype", "output")
    assert [row[1:7] for row in rows] == [[check[name] for name in names] for check in checks]
    assert len(list(tree.iter("circle"))) == len(checks) > 20
    values = [cell.attrib["data-value"] for cell in tree.iter("td") if cell.get("class") == "number"]
    assert [float(value) for value in values[2::3]] == [check["of_bound"] for check in checks]


def test_the_page_asks_for_nothing_from_elsewhere() -> None:
    page = report.page([RIGHT, WRONG, RAISED], {"torch": "2.13.0"})
    assert not re.search(r"https?:|//\w|src=|href|url\(|@import|\bfetch\b|<link|<iframe", page)
    assert "2.13.0" in page


def test_failures_are_marked_and_text_is_escaped() -> None:
    tree = parsed(report.page([RIGHT, WRONG, RAISED], {}))
    assert tree.findtext("body/h1") == "hw3gpu verify: 2 of 3 outputs failed"
    classes = [row.get("class") for row in tree.iter("tr")]
    assert classes == [None, None, "failed", "failed"]
    assert cells(tree)[-1][-1] == RAISED.note
    assert [float(cell.attrib["data-value"]) for cell in tree.iter("td") if cell.get("class") == "number"][-1] == math.inf


def test_marks_lie_where_the_shares_are() -> None:
    """On a logarithmic axis, with a line at 1; nothing is drawn outside the picture."""
    exact = replace(RIGHT, of_bound=0.0)
    svg = next(parsed(report.page([exact, RIGHT, WRONG, RAISED], {})).iter("svg"))
    at = [float(mark.attrib["cx"]) for mark in svg.iter("circle")]
    one = next(float(line.attrib["x1"]) for line in svg.iter("line") if line.get("stroke-width") == "1.5")
    assert report.LEFT == at[0] < at[1] < one < at[2] < at[3] < float(svg.attrib["width"])
    per_decade = (one - report.LEFT) / -math.log10(report.LEAST)
    assert at[1] == pytest.approx(one + per_decade * math.log10(0.25), abs=0.2)
    assert [mark.attrib["cy"] for mark in svg.iter("circle")] == ["8", "8", "24", "24"]


def test_a_page_that_cannot_be_written_is_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--report", str(tmp_path)]) == 2
    assert "argument --report" in capsys.readouterr().err

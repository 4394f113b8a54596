"""docs/architecture.md: its picture is up to date, its tables follow real calls, its symbols are names in the code."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch

import hw3gpu.functional as HF
from benchmarks import architecture

ROOT = architecture.ROOT
PAGE = architecture.PAGE.read_text()
OPERATIONS = ("batch_norm", "cross_entropy")
Call = tuple[str, str]  # a file, and a function or method in it


# ---------------------------------------------------------------------------------------------- the picture
def test_the_graph_is_that_of_the_imports() -> None:
    assert architecture.page_with(PAGE) == PAGE, "run `python -m benchmarks pictures`"
    modules, edges = architecture.parts()
    assert sum(map(len, modules.values())) > 80
    assert "hw3gpu/_torch/" in edges["hw3gpu/functional.py"]
    assert edges["hw3gpu/reference.py"] == set()


def test_every_folder_has_a_line() -> None:
    lines = PAGE.partition("## The parts")[2].partition("<!-- imports")[0]
    folders = {path.parent.relative_to(ROOT).as_posix() + "/" for path in architecture.files().values()}
    # those of an operation are named once for both engines
    named = [re.sub(r"^kernels/[gc]pu/(_(?!numba)\w+/)$", r"\1", folder) for folder in sorted(folders)]
    assert {"_batch_norm/", "kernels/cpu/_numba/", "hw3gpu/_torch/"} <= {*named}
    assert [folder for folder in named if f"`{folder}`" not in lines] == []


def test_the_graph_leaves_out_shortcuts_and_refuses_circles() -> None:
    assert architecture.without_shortcuts({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": {"b"}, "b": {"c"}, "c": set()}
    with pytest.raises(ValueError, match="circle"):
        architecture.without_shortcuts({"a": {"b"}, "b": {"a"}})


# ---------------------------------------------------------------------------------------------- calls
def calls(operation: str, engine: str) -> list[Call]:
    """The functions of the page's table, in their order."""
    rows = PAGE.partition(f"<!-- calls: {operation} {engine} -->")[2].partition("\n\n")[0]
    found = re.findall(r"^\| \d+ \| `([^`]+)` \| ([^|]+) \|", rows, re.MULTILINE)
    return [(file, name) for file, names in found for name in re.findall(r"`([^`]+)`", names)]


@cache
def functions_of(file: str) -> set[str]:
    """The functions and methods of a file, as `name` and `Class.name`."""
    tree = ast.parse((ROOT / file).read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    return found | {f"{c.name}.{node.name}" for c in classes for node in c.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("engine", ["gpu", "cpu"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_functions_that_the_page_follows_are_in_their_files(operation: str, engine: str) -> None:
    found = calls(operation, engine)
    assert len(found) > 8
    assert [call for call in found if call[1] not in functions_of(call[0])] == []


def recorded(run: Callable[[], object]) -> list[Call]:
    """The functions of this project that a call enters, one after the other."""
    entered: list[CodeType] = []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            entered.append(frame.f_code)

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(before)
    # kernels are imported through a link
    files = {code: Path(code.co_filename).resolve() for code in {*entered} if code.co_filename.startswith(str(ROOT / "hw3gpu"))}
    return [(files[code].relative_to(ROOT).as_posix(), code.co_name) for code in entered if code in files]


def batch_norm() -> None:
    x, weight, bias = torch.randn(2, 2, 4, 8).double().requires_grad_(), *torch.ones(2, 2).double().requires_grad_()
    HF.batch_norm(x, None, None, weight, bias, training=True).backward(torch.ones_like(x))


def cross_entropy() -> None:
    z = torch.randn(2, 6).double().requires_grad_()
    HF.cross_entropy(z, torch.arange(2)).backward()


def test_the_calls_of_the_page_are_those_of_a_real_call(device: str, request: pytest.FixtureRequest) -> None:
    """Of a call in float64 on the host, in Python: what Numba has compiled is entered unseen."""
    if device != "cpu":
        pytest.skip("kernels on a device are entered unseen; in the interpreter they are functions of Python")
    engine = request.config.getoption("--kernels")
    for operation, run in zip(OPERATIONS, (batch_norm, cross_entropy), strict=True):
        entered = iter(recorded(run))
        named = [(file, name.rpartition(".")[2]) for file, name in calls(operation, engine)]
        seen = [call for call in named if not compiled(*call)]
        assert len(seen) > (8 if engine == "gpu" else 6)
        assert [call for call in seen if call not in entered] == []  # `in` goes on from the call before


def compiled(file: str, name: str) -> bool:
    """Whether Numba compiles the function."""
    if not file.startswith("kernels/cpu/_"):
        return False
    nodes = ast.parse((ROOT / file).read_text()).body
    return any(isinstance(node, ast.FunctionDef) and node.name == name and node.decorator_list for node in nodes)


def test_the_table_of_places_counts_the_files_and_functions_of_the_calls() -> None:
    rows = re.findall(r"^\| ([^|]*)\| (GPU|CPU) \| `([^`]+)`: `(\w+)` \| (\d+) \| (\d+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 4
    operations = [operation for operation in OPERATIONS for _ in range(2)]
    for (_, engine, file, name, files, functions), operation in zip(rows, operations, strict=True):
        found = calls(operation, engine.lower())
        assert (file, name) == found[-1]
        assert (int(files), int(functions)) == (len({file for file, _ in found}), len(found))
        assert int(files) <= 4


def test_the_answer_sheet_is_one_call() -> None:
    sheet = functions_of("hw3gpu/reference.py")
    named = re.findall(r"answer sheet \| `hw3gpu/reference.py`: `(\w+)` \| 1 \| 1 \|", PAGE)
    assert named == ["batch_norm_backward", "softmax_cross_entropy"]
    assert set(named) <= sheet


def test_who_decides_is_in_the_file_that_the_page_names() -> None:
    rows = PAGE.partition("## Who decides")[2].partition("## ")[0]
    found = [
        (file, name)
        for names, file in re.findall(r"\| ((?:`\w+`(?:, | and )?)+) in `([^`]+)` \|", rows)
        for name in re.findall(r"`(\w+)`", names)
    ]
    assert len(found) > 8
    assert [call for call in found if call[1] not in functions_of(call[0])] == []


# ---------------------------------------------------------------------------------------------- lines
def test_every_file_is_in_a_part_whose_lines_are_counted() -> None:
    """A file belongs to the row with the longest pattern that fits; the numbers may be off by a tenth."""
    table = PAGE.partition("<!-- lines: begin -->")[2].partition("<!-- lines: end -->")[0]
    rows = re.findall(r"^\| ([^|]+) \| (`[^|]+) \| ([\d,]+) \| [^|]+ \|$", table, re.MULTILINE)
    patterns = [(pattern, part) for part, cell, _ in rows for pattern in re.findall(r"`([^`]+)`", cell)]
    counted = dict.fromkeys((part for part, *_ in rows), 0)
    assert len(counted) > 12
    for path in (path for path in architecture.files().values() if path.read_text()):
        file = path.resolve().relative_to(ROOT).as_posix()
        fits = [(len(pattern), part) for pattern, part in patterns if fnmatch(file, re.sub("/$", "/*", pattern))]
        assert fits, f"{file} is in no row"
        counted[max(fits)[1]] += len(path.read_text().splitlines())
    said = {part: int(number.replace(",", "")) for part, _, number in rows}
    assert {part: lines for part, lines in counted.items() if not 0.9 < said[part] / lines < 1.1} == {}


# ---------------------------------------------------------------------------------------------- symbols
def test_the_symbols_are_names_in_the_code() -> None:
    rows = PAGE.partition("## Symbols in the code")[2]
    named = {name for cell in re.findall(r"^\| (`[^|]+) \|", rows, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)}
    nodes = [node for path in architecture.files().values() for node in ast.walk(ast.parse(path.read_text()))]
    names = {node.id for node in nodes if isinstance(node, ast.Name)} | {n.arg for n in nodes if isinstance(n, ast.arg)}
    assert len(named) > 40
    assert sorted(named - names) == []

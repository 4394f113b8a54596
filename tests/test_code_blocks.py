"""Every code block of every page is run, or says in a comment before it why it is not.

A page's Python is one program: its blocks, in their order, in a file of its own, for kernels are compiled from their source.
Before a block, a comment `<!-- not run: reason -->` leaves it out, `<!-- runs with the Triton kernels: … -->` leaves it to that
leg of the tests, and `<!-- run by tests/….py -->` names the test that runs it and compares. Commands are read: their targets,
files and arguments are those that there are.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.__main__ import parser as benchmarks_parser
from hw3gpu.__main__ import _parser as command_parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md",
    ROOT / "kernels" / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "integrations").glob("*/README.md")),
]  # fmt: skip
BLOCK = re.compile(r"(?:^<!-- ([^\n]*?) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DRAWN = ("math", "mermaid", "text")  # what is shown, and is no code
COMMANDS = ("", "sh", "bash", "console")


class Block(NamedTuple):
    line: int
    kind: str
    text: str
    said: str  # in the comment before it

    @property
    def triton(self) -> bool:
        return self.said.startswith("runs with the Triton kernels: ")

    @property
    def elsewhere(self) -> bool:
        return bool(re.match(r"(not run: \S|run by tests/)", self.said))


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(text[: found.start(3)].count("\n"), found[2], found[3], found[1] or "")
        for found in BLOCK.finditer(text)
        if found[2] not in DRAWN
    ]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def program(page: Path, triton: bool) -> str:
    """A page's Python, each line where the page has it, so that an error names it."""
    lines = [""] * len(page.read_text().splitlines())
    for block in blocks(page):
        if block.kind == "python" and not block.elsewhere and (triton or not block.triton):
            text = block.text.splitlines()
            lines[block.line : block.line + len(text)] = text
    return "\n".join(lines) + "\n"


WITH_PYTHON = [page for page in PAGES if program(page, True).strip()]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    run(page, tmp_path, triton=False)


@pytest.mark.interpreter
@pytest.mark.parametrize("page", [page for page in WITH_PYTHON if any(block.triton for block in blocks(page))], ids=name)
def test_the_triton_kernels_of_a_page_run(page: Path, tmp_path: Path) -> None:
    run(page, tmp_path, triton=True)


def run(page: Path, folder: Path, triton: bool) -> str:
    file = folder / f"{page.stem}.py"
    file.write_text(program(page, triton))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(file.read_text(), str(file), "exec"), {"__name__": "page"})
    return printed.getvalue()


def test_the_quick_start_prints_what_it_says(tmp_path: Path) -> None:
    assert run(ROOT / "docs" / "index.md", tmp_path, False).endswith("True\n")


# ---------------------------------------------------------------------------------------------- what is not run
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_is_not_run_says_why(page: Path) -> None:
    for block in blocks(page):
        assert block.kind in ("python", "diff", *COMMANDS), f"{name(page)}:{block.line}: ```{block.kind}"
        if block.kind == "diff":
            assert block.elsewhere, f"{name(page)}:{block.line}: no comment says which test runs it"
        for file in re.findall(r"run by (tests/\S+)", block.said):
            assert page.name in (ROOT / file).read_text(), f"{name(page)}:{block.line}: {file} does not read the page"


TARGETS = {word for line in re.findall(r"^(?!\.)([\w -]+):", (ROOT / "Makefile").read_text(), re.M) for word in line.split()}
READ = {"make", "python", "hw3gpu"}


def commands(page: Path) -> list[list[str]]:
    """The words of each command, without variables set before it, folders of programs, and what follows `&&` or `|`."""
    found = []
    for block in blocks(page):
        for line in block.text.splitlines() if block.kind in COMMANDS else ():
            for part in re.split(r"&&|\|(?!\|)", re.sub(r"\s+#.*", "", line)):
                words = [word for word in shlex.split(part) if not re.match(r"[A-Z_]+=", word)]
                found += [[words[0].rpartition("/")[2], *words[1:]]] if words else []
    return found


def misread(words: list[str]) -> str:
    """'' if a command is one that there is, else what it has that there is not; of other programs nothing is asked."""
    tool, *rest = words
    if tool == "make":
        return ", ".join(word for word in rest if "=" not in word and word not in TARGETS)
    if tool == "hw3gpu":
        command_parser().parse_args(rest)
    elif rest[:2] == ["-m", "benchmarks"]:
        benchmarks_parser().parse_args([word for word in rest[2:] if word != "…"])
    elif tool == "python" and rest and rest[0].endswith(".py"):
        return "" if (ROOT / rest[0]).is_file() else rest[0]
    elif tool == "python" and rest[:1] == ["-m"]:
        return "" if importlib.util.find_spec(rest[1]) else rest[1]
    return ""


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name)
def test_the_commands_of_a_page_are_there(page: Path) -> None:
    assert [words for words in commands(page) if words[0] in READ and misread(words)] == []


def test_a_command_that_is_not_there_would_be_found() -> None:
    assert misread(["make", "nothing"]) == "nothing"
    assert misread(["python", "examples/nothing.py"]) == "examples/nothing.py"
    for words in (["python", "-m", "benchmarks", "cpu", "--nothing"], ["hw3gpu", "nothing"]):
        with pytest.raises(SystemExit):
            misread(words)

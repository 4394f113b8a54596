"""The site: every page has its place, and where MkDocs is installed, it is built. `test_code_blocks` runs the pages' code."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import hw3gpu
import hw3gpu.distributed
import hw3gpu.functional
import hw3gpu.nn

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
CONFIG = (ROOT / "mkdocs.yml").read_text()
NAV = re.findall(r"^ +- [^:\n]*: (\S+\.md)$", CONFIG.partition("\nnav:")[2], re.MULTILINE)


def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "site_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = hooks()


def test_every_page_is_in_the_navigation() -> None:
    outside = [name for source, name in HOOKS.OUTSIDE.items() if source != "README.md"]
    assert sorted(NAV) == sorted([*(page.name for page in DOCS.glob("*.md")), *outside])


def test_a_second_paragraph_of_a_list_is_indented_by_four() -> None:
    """Python-Markdown ends the list at a paragraph that is indented by less; GitHub does not."""
    pages = [*DOCS.glob("*.md"), *(ROOT / source for source in HOOKS.OUTSIDE)]
    assert [
        page.name for page in pages if re.search(r"^\n {1,3}[^ \n]", HOOKS.CODE.sub("", page.read_text()), re.MULTILINE)
    ] == []


def public(module: Any) -> set[str]:
    return {name for name in module.__all__ if not isinstance(getattr(module, name), ModuleType)}


@pytest.mark.parametrize(
    ("page", "module"),
    [
        ("api_arrays.md", hw3gpu), ("api_functional.md", hw3gpu.functional),
        ("api_nn.md", hw3gpu.nn), ("api_distributed.md", hw3gpu.distributed),
    ],
)  # fmt: skip
def test_the_reference_has_every_public_name(page: str, module: Any) -> None:
    named = re.findall(r"^::: (\S+)\.(\w+)$", (DOCS / page).read_text(), re.MULTILINE)
    assert {of for of, _ in named} == {module.__name__}
    assert {name for _, name in named} == public(module)
    assert len(named) == len(public(module))


def test_the_table_of_functions_names_what_there_is_and_leaves_no_function_out() -> None:
    text = (DOCS / "choose.md").read_text()
    for name in re.findall(r"`hw3gpu((?:\.\w+)+)", text):
        of = hw3gpu
        for part in name.split(".")[1:]:
            of = getattr(of, part)
    functions = {name for name in public(hw3gpu) if name.islower()} - {
        *("use_backend", "empty_cache"), *("conv2d_padding_for", "conv_transpose2d_output_shape"),  # about the others
    }  # fmt: skip
    assert [name for name in sorted(functions) if f"`hw3gpu.{name}`" not in text] == []


def test_mathematics_and_links_become_those_of_the_site() -> None:
    text = "An $`x_1`$ and $y$ of [a](../kernels/README.md#b), [c](../hw3gpu/nn.py), [`d`](errors.md), [e](https://f.g).\n"
    block = "```math\nx = 1 \\tag{1}\n```\n"
    code = "```python\nprint('[a](../kernels/README.md)')\n```\n"
    assert HOOKS.markdown("derivations.md", text + block + code) == (
        "An $x_1$ and $y$ of [a](kernels.md#b), c, [`d`](errors.md), [e](https://f.g).\n\n$$\nx = 1 \\tag{1}\n$$\n\n" + code
    )
    assert HOOKS.markdown("kernels.md", "[a](../docs/gpu.md), [b](cpu/softmax.py)") == "[a](gpu.md), b"


@pytest.mark.skipif(not importlib.util.find_spec("mkdocs"), reason="MkDocs is not installed: `make docs` installs and runs it")
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "\\tag{2.1}" in (tmp_path / "derivations" / "index.html").read_text()


@pytest.mark.skipif(not importlib.util.find_spec("griffe"), reason="mkdocstrings is not installed: `make docs` installs it")
def test_what_a_docstring_says_of_its_arguments_becomes_a_list() -> None:
    spec = importlib.util.spec_from_file_location("griffe_arguments", DOCS / "griffe_arguments.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = "First line.\n\nx: (N,) of\nfloats. weight, bias: (C,). mode: 'a: b' or not.\n\nRaises: nothing. Of x: y."
    assert module.listed(text, ["x", "weight", "bias", "mode"]) == (
        "First line.\n\n- **x**: (N,) of floats.\n- **weight, bias**: (C,).\n- **mode**: 'a: b' or not.\n\n"
        "Raises: nothing. Of x: y."
    )

"""The pages: links and files that they name are there, their pictures are up to date, and their tables list everything.

Text alone is read: nothing is computed.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from benchmarks import architecture, pictures

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        ROOT / "kernels" / "README.md",
        *ROOT.glob("integrations/*/README.md"),
        ROOT / "examples" / "README.md",
    ]
)
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", without_blocks(text))


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


# ---------------------------------------------------------------------------------------------- links and files
def anchors(page: Path) -> set[str]:
    """What a link into a page may end in: GitHub's name of each heading, and the anchors that the page has."""
    text = page.read_text()
    headings = re.findall(r"^#+ (.*)$", without_blocks(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings} | {
        *re.findall(r'<a id="([^"]+)"', text)
    }


def broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        found = (page.parent / target).resolve() if target else page
        if not found.exists() or (anchor and anchor not in anchors(found)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page, page.read_text()) == []


def test_a_broken_link_would_be_found() -> None:
    text = "[a](docs/errors.md#sums) [b](docs/nothing.md) [c](docs/errors.md#nothing) [d](https://example.org/x)"
    assert broken_links(ROOT / "README.md", text) == ["docs/nothing.md", "docs/errors.md#nothing"]


# files of other projects, what a command writes, and patterns
NOT_HERE = {
    *("kernels/cpu/X.py", "kernels/gpu/X.py", "kernels/cpu/lse.py", "kernels/gpu/lse.py"),
    *("flash_attn/losses/cross_entropy.py", "flash_attn/ops/triton/cross_entropy.py"),
    "apex/parallel/optimized_sync_batchnorm.py",
    *("trl/trainer/utils.py", "verl/utils/torch_functional.py"),
    "tritonbench/operators/ADD_OPERATOR.md",
    *("results.json", "measurements.csv", "speedup.png", "bandwidth.png", "roofline.png", "operator_summary.csv"),
    *("tuned.json", "gpu/tuned.json", "kernels/gpu/tuned.json"),
}
FILE = re.compile(r"`([\w./-]+\.(?:py|md|json|svg|png|csv|txt|toml|yaml))`")
# a page may name a file from its own folder, or from the package's, the kernels' or an engine's
FOLDERS = [ROOT, *(ROOT / name for name in ("hw3gpu", "kernels", "kernels/cpu", "kernels/gpu", "benchmarks", "tests"))]


def missing_files(page: Path, text: str) -> list[str]:
    named = {*FILE.findall(text)} | {f"tests/{test}.py" for test in re.findall(r"`(test_\w+)`", text) if "tests/" in text}
    places = [page.parent, page.parent / "source", *FOLDERS]
    return sorted(file for file in named - NOT_HERE if not any((place / file).is_file() for place in places))


# the changelog tells of files that have gone
@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    assert missing_files(page, page.read_text()) == []


def test_a_file_that_is_not_there_would_be_found() -> None:
    assert missing_files(ROOT / "README.md", "`hw3gpu/nothing.py`, `hw3gpu/nn.py`") == ["hw3gpu/nothing.py"]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


# ---------------------------------------------------------------------------------------------- the picture
def test_the_bars_are_those_of_the_table() -> None:
    page = pictures.TABLE.read_text()
    assert pictures.PICTURE.read_text() == pictures.bars(page), "run `python -m benchmarks pictures`"
    rows = pictures.rows(page)
    assert len(rows) == len([line for line in page.split("× a plain copy")[1].split("\n\n")[0].splitlines()[2:] if line])
    assert all(f">{speedup:.2f}<" in pictures.PICTURE.read_text() for row in rows for speedup in row.speedups)


# ---------------------------------------------------------------------------------------------- CONTRIBUTING.md
# what other packages read, and this project's code does not name
READ_BY_OTHERS = {"TRITON_CACHE_DIR", "NUMBA_CACHE_DIR"}
VARIABLE = re.compile(r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+")


@cache
def variables_of_the_code() -> frozenset[str]:
    """Names in capitals, as strings or keywords, in files that read the environment; not those of `os.sysconf`."""
    files = [*architecture.files().values(), *(ROOT / "benchmarks").rglob("*.py"), ROOT / "tests" / "conftest.py"]
    nodes = [node for path in files if "environ" in path.read_text() for node in ast.walk(ast.parse(path.read_text()))]
    strings = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    keywords = {node.arg for node in nodes if isinstance(node, ast.keyword) and node.arg}
    found = {name for name in strings | keywords if VARIABLE.fullmatch(name) and not name.startswith("SC_")}
    # other variables that tests set are inputs of a test
    own = {
        name for path in [*ROOT.glob("tests/*.py"), ROOT / "Makefile"] for name in re.findall(r"HW3GPU_\w+", path.read_text())
    }
    return frozenset(found | own)


def table(heading: str, of: str) -> list[str]:
    """The names in the first column of the table that follows a text."""
    rows = of.partition(heading)[2].partition("|---")[2].partition("\n\n")[0]
    return re.findall(r"^\| `(\w+)` \|", rows, re.MULTILINE)


def test_the_table_of_environment_variables_has_all_that_the_code_reads() -> None:
    found = variables_of_the_code()
    assert {"HW3GPU_BACKEND", "XDG_CACHE_HOME", "OPENBLAS_CORETYPE"} <= found
    assert sorted(table("## Environment variables", CONTRIBUTING)) == sorted(found | READ_BY_OTHERS)


def test_the_table_of_the_makefile_has_all_that_it_reads() -> None:
    used = {*re.findall(r"\$\((\w+)\)", MAKEFILE)} - {"MAKE"}
    set_there = {*re.findall(r"^(\w+) :?=", MAKEFILE, re.MULTILINE)}
    assert sorted(table("The `Makefile` reads these", CONTRIBUTING)) == sorted(used - set_there)


def test_pre_commit_runs_what_make_lint_runs() -> None:
    lint = MAKEFILE.partition("\nlint:")[2].partition("\n\n")[0].splitlines()[1:]
    hooks = re.findall(r"^ +entry: (.*)$", (ROOT / ".pre-commit-config.yaml").read_text(), re.MULTILINE)
    assert hooks == [line.strip().replace("$(BIN)", ".venv/bin") for line in lint]
    assert len(hooks) == 3


def test_the_targets_that_it_names_are_there() -> None:
    targets = {*re.findall(r"^(?!\.)([\w -]+):", MAKEFILE, re.MULTILINE)}
    named = {*re.findall(r"`make ([\w-]+)", "".join(page.read_text() for page in PAGES))}
    assert named <= {word for line in targets for word in line.split()}
    assert {"demo", "test", "quick"} <= named


def test_the_example_of_machine_code_is_one() -> None:
    """All but the compilation, which `test_evidence` does for others."""
    (block,) = re.findall(r"```python\n(.*?)```", CONTRIBUTING, re.DOTALL)
    names: dict[str, object] = {}
    exec(block[: block.index("print(")], names)
    assert names["case"].dtype.itemsize == 4  # type: ignore[attr-defined]


def test_every_derivation_has_its_kernel_in_the_guide() -> None:
    """The first column of its table names each section once: "1.1 to 1.4", "2.2, 2.3"."""
    headings = re.findall(r"^### (\d+)\.(\d+) ", (ROOT / "docs" / "derivations.md").read_text(), re.MULTILINE)
    rows = (ROOT / "docs" / "kernel_guide.md").read_text().partition("| [derivation]")[2].partition("\n\n")[0]
    named: list[tuple[int, int]] = []
    for cell in re.findall(r"^\| ([\d., to]+)", rows, re.MULTILINE):
        for chapter, first, last in re.findall(r"(\d+)\.(\d+)(?: to \d+\.(\d+))?", cell):
            named += [(int(chapter), section) for section in range(int(first), int(last or first) + 1)]
    assert named == [(int(chapter), int(section)) for chapter, section in headings]

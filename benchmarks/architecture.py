"""The imports of `hw3gpu/` and `kernels/`, read from the sources, and the graph of them in docs/architecture.md."""

from __future__ import annotations

import ast
import functools
import textwrap
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- imports: begin -->", "<!-- imports: end -->"


class Import(NamedTuple):
    module: str  # absolute, with the imported names as a last part: 'hw3gpu._core.outputs.fold'
    line: int


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports_of(path: Path, package: str, at_load: bool = False) -> Iterator[Import]:
    """Every import of a file, inside functions too (unless `at_load`), as absolute names."""
    tree = _tree(path)
    for node in tree.body if at_load else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            prefix = [*base, *([node.module] if node.module else [])]
            yield from (Import(".".join([*prefix, alias.name]), node.lineno) for alias in node.names)


def files() -> dict[str, Path]:
    """Each source file by its module's name as installed: `hw3gpu._core.check`, `hw3gpu.kernels.gpu.softmax`."""
    of_package = (path for path in (ROOT / "hw3gpu").rglob("*.py") if "kernels" not in path.parts)
    of_kernels = (ROOT / "kernels").rglob("*.py")
    found = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in of_package}
    found |= {f"hw3gpu.{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}": path for path in of_kernels}
    return dict(sorted(found.items()))


@functools.cache
def graph() -> dict[str, set[str]]:
    """For each module the modules that it imports, anywhere in its file."""
    modules = files()
    found: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        for one in imports_of(path, name.rpartition(".")[0]):
            # the longest module that is a beginning of the imported name
            words = one.module.split(".")
            beginnings = (".".join(words[:k]) for k in range(len(words), 0, -1))
            target = next((m for c in beginnings for m in (c, f"{c}.__init__") if m in modules), name)
            found[name].add(target)
    return {name: of - {name} for name, of in found.items()}


def part(module: str, found: dict[str, set[str]]) -> str:
    """The box of a module: its folder, or itself in `hw3gpu/`.

    A folder `kernels/<engine>` has two boxes. The launchers are what no other file of the engine imports, or what imports the
    folder of an operation; the base is what they stand on.
    """
    *folders, name = module.split(".")
    if folders == ["hw3gpu"]:
        return f"hw3gpu/{name}.py"
    folder = "/".join(folders).removeprefix("hw3gpu/" if "kernels" in folders else "") + "/"
    if folders[1] != "kernels" or len(folders) > 3:
        return folder
    engine = ".".join(folders)
    used = any(module in of for other, of in found.items() if other.startswith(f"{engine}."))
    inner = {
        one.removeprefix(f"{engine}.").partition(".")[0] for one in found[module] if one.count(".") > engine.count(".") + 1
    }
    on_operations = bool(inner - {"_numba"})
    return f"{folder} base" if used and not on_operations else folder


def parts() -> tuple[dict[str, list[str]], dict[str, set[str]]]:
    """The modules of each box, and the boxes that it imports."""
    found = graph()
    box = {name: part(name, found) for name in found if not name.endswith(".__init__") or name.count(".") == 1}
    modules: dict[str, list[str]] = {}
    edges: dict[str, set[str]] = {}
    for name, of in box.items():
        modules.setdefault(of, []).append(name.rpartition(".")[2])
        edges.setdefault(of, set()).update(box[one] for one in found[name] if one in box)
    return modules, {of: to - {of} for of, to in edges.items()}


def without_shortcuts(found: dict[str, set[str]]) -> dict[str, set[str]]:
    """The graph without each edge that a longer way leads to as well. ValueError where it has a circle."""
    try:
        order = list(TopologicalSorter(found).static_order())
    except CycleError as error:
        raise ValueError(f"parts import each other in a circle: {error.args[1]}") from error
    reached: dict[str, set[str]] = {}
    for name in order:
        reached[name] = found[name].union(*(reached[one] for one in found[name]))
    return {name: {one for one in of if all(one not in reached[other] for other in of)} for name, of in found.items()}


def _label(name: str, modules: list[str]) -> str:
    if not name.endswith(("/", " base")):
        return name
    return f"{name.removesuffix(' base')}<br/>{'<br/>'.join(textwrap.wrap(', '.join(modules), 44))}"


def mermaid() -> str:
    """The graph as Mermaid's text, which GitHub draws."""
    modules, found = parts()
    edges = without_shortcuts(found)
    number = {name: f"n{k}" for k, name in enumerate(edges)}
    lines = ["```mermaid", "flowchart TD"]
    for top in ("hw3gpu/", "kernels/gpu/", "kernels/cpu/"):
        inside = [name for name in edges if name.startswith(top)]
        boxes = (f'    {number[name]}["{_label(name, modules[name])}"]' for name in inside)
        lines += [f'  subgraph {top.strip("/").replace("/", "_")}["{top}"]', *boxes, "  end"]
    lines += [f"  {number[name]} --> {number[one]}" for name, of in edges.items() for one in sorted(of)]
    return "\n".join([*lines, "```"])


def page_with(text: str) -> str:
    """The text of docs/architecture.md with today's graph between its marks."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{mermaid()}\n{END}{rest.split(END)[1]}"

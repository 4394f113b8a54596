"""Writes the folder that Hugging Face's kernel-builder takes: `python integrations/kernels_hub/make_folder.py FOLDER`.

It is `source/` beside this file, and in `torch-ext/hw3gpu/gpu/` those modules of `kernels/gpu` that it needs: the launchers of
`LAUNCHERS` and what they import.
"""

from __future__ import annotations

import ast
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).resolve().parent / "source"
KERNELS = ROOT / "kernels" / "gpu"
LAUNCHERS = ("softmax.py", "cross_entropy.py", "batch_norm.py")


def make(folder: Path) -> None:
    """Writes the folder; FileExistsError if there is one with something in it."""
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: expected no folder, or an empty one")
    shutil.copytree(SOURCE, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "LICENSE", folder)
    for path in sorted(needed()):
        target = folder / "torch-ext" / "hw3gpu" / "gpu" / path.relative_to(KERNELS)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)


def needed() -> set[Path]:
    """The files of `kernels/gpu` that the launchers import, at any depth, and their packages."""
    pending, found = [KERNELS / name for name in LAUNCHERS], set()
    while pending:
        path = pending.pop()
        if path not in found:
            found.add(path)
            pending += _imported(path)
    return found | {folder / "__init__.py" for path in found for folder in path.parents if folder.is_relative_to(KERNELS)}


def _imported(path: Path) -> Iterator[Path]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for name in (base, *(base / alias.name for alias in node.names)):
                if name.with_suffix(".py").is_file():
                    yield name.with_suffix(".py")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    make(Path(sys.argv[1]))

"""What Hugging Face's kernel-builder does to a `[torch-noarch]` folder, and how `kernels` loads it, without Nix and the Hub.

After huggingface/kernels: kernel-builder/src/pyproject/torch/noarch.rs and kernels/src/kernels/importer.py.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

# `_ops.py`, which the builder adds: names that no other build of the kernel has
_OPS = """import torch

_OPS_NAME = "{name}"
ops = getattr(torch.ops, _OPS_NAME)


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{{_OPS_NAME}}::{{op_name}}"
"""


def build(folder: Path, version: int, backend: str = "cuda", unique: str = "0123abc") -> Path:
    """The build variant of a folder: `build/torch-<backend>`."""
    variant = folder / "build" / f"torch-{backend}"
    shutil.copytree(folder / "torch-ext" / "hw3gpu", variant)
    name = f"_hw3gpu_{backend}_{unique}"
    (variant / "_ops.py").write_text(_OPS.format(name=name))
    metadata = {"id": name, "name": "hw3gpu", "version": version, "license": "MIT", "python-depends": []}
    digest = {"algorithm": "sha256", "files": {}}  # of the files, which the builder signs
    (variant / "metadata.json").write_text(json.dumps(metadata | {"backend": {"type": backend}, "digest": digest}))
    return variant


def load(variant: Path) -> ModuleType:
    """The kernel of a build variant, imported under its unique name from a folder that is on no import path."""
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

"""What decides the machine code of a case, found without compiling it: the kernels' text, and how each launch asks for them.

Evidence of a case is stale when its key changed, so that a plan or a launcher may be edited and only the cases whose launches
became others are compiled again. A key does not depend on Triton's version, which evidence.json tells apart.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import io
import itertools
import textwrap
import tokenize
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from hw3gpu._torch import bound_launches

from .case import Case
from .compile_without_gpu import StandIn


def key(case: Case, architectures: tuple[int | str, ...], schema: int) -> str:
    """A hash of the launches of `case` on these architectures, and of what else is recorded with them."""
    digest = hashlib.sha256(repr((schema, sorted(case.moves.items()))).encode())
    for arch in architectures:
        for launch in asked_for(case, arch):
            digest.update(repr((arch, launch)).encode())
    return digest.hexdigest()[:16]


def asked_for(case: Case, arch: int | str) -> list[tuple[Any, ...]]:
    """Each launch of a case: the kernel's text as a hash, the grid, and what Triton specialises the kernel by."""
    launches: list[tuple[Any, ...]] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        given = [_argument(a) for a in args], sorted((name, repr(constant)) for name, constant in named.items())
        launches.append((kernel.__name__, text_hash(kernel), tuple(grid), *given))

    bound_launches.forget()  # a kept call of the same shapes launches without Triton
    with StandIn(arch), mock.patch.object(JITFunction, "run", run):
        case.run()
    return launches


def _argument(value: Any) -> Any:
    """A tensor by its dtype and how far it is off 16 bytes, a number by what Triton asks of it; all else as it is."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.storage_offset() * value.element_size() % 16
    if type(value) is int:
        return "int", value == 1, value % 16 == 0, value.bit_length() > 31
    return "float" if type(value) is float else repr(value)


@functools.cache
def text_hash(kernel: Any) -> str:
    """A hash of the kernel's text, and of all that it calls or reads beside its arguments."""
    digest = hashlib.sha256()
    for part in sorted(_texts(kernel, set())):
        digest.update(part.encode())
    return digest.hexdigest()


def _texts(kernel: Any, seen: set[Any]) -> Iterator[str]:
    if kernel in seen:
        return
    seen.add(kernel)
    text = textwrap.dedent(inspect.getsource(kernel.fn))
    yield code_of(text)
    for node in ast.walk(ast.parse(text)):
        name, value = _global(node, kernel.fn.__globals__)
        if isinstance(value, JITFunction):
            yield from _texts(value, seen)
        elif isinstance(value, tl.constexpr | int | float | str | tuple):
            yield f"{name} = {value!r}"


def code_of(text: str) -> str:
    """A function's tokens without comments, docstrings and line breaks inside a statement: prose decides no machine code."""
    read = tokenize.generate_tokens(io.StringIO(text).readline)
    tokens = [token for token in read if token.type not in (tokenize.COMMENT, tokenize.NL)]
    found = [""]
    for token, after in itertools.pairwise(tokens):
        at_start = found[-1] in ("NEWLINE", "INDENT", "DEDENT")
        if at_start and (token.type == tokenize.NEWLINE or (token.type == tokenize.STRING and after.type == tokenize.NEWLINE)):
            continue
        found.append(token.string if token.string.strip() else tokenize.tok_name[token.type])
    return " ".join(found)


def _global(node: ast.AST, of: dict[str, Any]) -> tuple[str, Any]:
    """What a name, or a module's attribute, stands for in a kernel of the module `of`; nothing of Triton's own."""
    if isinstance(node, ast.Name):
        return node.id, of.get(node.id)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        module = of.get(node.value.id)
        if isinstance(module, ModuleType) and not module.__name__.startswith(triton.__name__):
            return f"{node.value.id}.{node.attr}", getattr(module, node.attr, None)
    return "", None

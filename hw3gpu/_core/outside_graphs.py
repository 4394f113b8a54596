"""What `torch.compile` does not trace; a module of its own, since the mark imports the compiler, which takes a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable(reason="the array functions are not traced: hw3gpu.functional has those that are")
def eagerly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function(...)`, outside the graph that `torch.compile` makes of the caller."""
    return function(*args, **kwargs)

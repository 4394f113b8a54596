"""How this library's modules answer tools that read a model: a leaf for `torch.fx`, an error for `torch.jit.script`."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch.fx import Proxy

__all__ = ["Proxy", "Unscripted", "as_leaf"]


def as_leaf(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The call as one node of the graph that `torch.fx` traces, as it records PyTorch's own modules."""
    tracer: Any = next(arg for arg in (*args, *kwargs.values()) if isinstance(arg, Proxy)).tracer
    given = {name: value for name, value in kwargs.items() if value is not None}
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, given)


class Unscripted(torch.nn.Module):
    """A module whose kernels `torch.jit.script` cannot compile: the error says what to do instead."""

    def __prepare_scriptable__(self) -> NoReturn:
        raise TypeError(
            f"torch.jit.script: {type(self).__name__} runs this library's kernels, and TorchScript has PyTorch's operations "
            "alone: script hw3gpu.nn.to_torch(copy.deepcopy(model)), or use torch.jit.trace"
        )

"""What our modules become in PyTorch's operations alone, where PyTorch has no module for them: scripted, traced, quantised."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

__all__ = ["TorchBatchNormAct"]


class TorchBatchNormAct(torch.nn.Module):
    """activation(norm(input) + residual) by PyTorch's modules; the `state_dict` has the keys of `norm`."""

    def __init__(self, norm: torch.nn.Module, activation: torch.nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.activation = activation
        self._register_state_dict_hook(_as_of_norm)
        self.register_load_state_dict_pre_hook(_for_norm)

    def forward(self, input: Tensor, residual: Optional[Tensor] = None) -> Tensor:  # noqa: UP045  for TorchScript
        """(N, C, …) normalised, plus `residual`, through `activation`."""
        y = self.norm(input)
        if residual is not None:
            y = y + residual
        return self.activation(y)


def _as_of_norm(module: Any, state_dict: Any, prefix: str, metadata: Any) -> None:
    """weight for norm.weight, and so on."""
    for key in [key for key in state_dict if key.startswith(f"{prefix}norm.")]:
        state_dict[prefix + key.removeprefix(f"{prefix}norm.")] = state_dict.pop(key)


def _for_norm(module: Any, state_dict: Any, prefix: str, *_: Any) -> None:
    """norm.weight for weight, and so on."""
    for name in module.norm.state_dict():
        if prefix + name in state_dict:
            state_dict[f"{prefix}norm.{name}"] = state_dict.pop(prefix + name)

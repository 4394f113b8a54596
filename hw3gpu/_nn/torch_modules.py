"""What our modules become in PyTorch's operations alone, where PyTorch has no module for them: scripted, traced, quantised.

TorchScript reads the annotations: they are no strings.
"""

from typing import Any, Optional

import torch
from torch import Tensor

__all__ = ["ACTIVATIONS", "TorchBatchNormAct", "TorchFrozenBatchNorm2d", "activation_of"]

ACTIVATIONS = {"relu": torch.nn.ReLU, "silu": torch.nn.SiLU, "hardswish": torch.nn.Hardswish, "gelu": torch.nn.GELU}
# timm's own modules of the same functions
_OF_TIMM = {"Swish": "silu", "HardSwish": "hardswish", "GELU": "gelu"}


def activation_of(module: Any) -> Optional[str]:  # noqa: UP045  for TorchScript
    """The name of the activation that a module is, None where it is none of ours: GELU by tanh, classes derived from these."""
    for name, of in ACTIVATIONS.items():
        if type(module) is of:
            return name if getattr(module, "approximate", "none") == "none" else None
    return _OF_TIMM.get(type(module).__name__) if type(module).__module__.partition(".")[0] == "timm" else None


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


class TorchFrozenBatchNorm2d(torch.nn.Module):
    """Batch normalisation by constants, as torchvision's `FrozenBatchNorm2d` computes it: (N, C, H, W)."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), value))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)  # of a batch normalisation
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) normalised by the constants; gradients go to x alone."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"

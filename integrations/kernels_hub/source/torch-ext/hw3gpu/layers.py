"""Layers whose `forward` takes the place of PyTorch's: they have no state of their own, and read the adopting module's."""

import torch
from torch import nn

from ._batch_norm import batch_norm
from ._cross_entropy import cross_entropy
from ._softmax import softmax


class Softmax(nn.Module):
    """For `torch.nn.Softmax`."""

    has_backward: bool = True
    can_torch_compile: bool = True

    dim: int | None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        dim = self.dim
        if dim is None:  # PyTorch's implicit choice
            dim = 0 if input.dim() in (0, 1, 3) else 1
        return softmax(input, dim)


class CrossEntropyLoss(nn.Module):
    """For `torch.nn.CrossEntropyLoss`."""

    has_backward: bool = True
    can_torch_compile: bool = True

    weight: torch.Tensor | None
    ignore_index: int
    reduction: str
    label_smoothing: float

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return cross_entropy(input, target, self.weight, self.ignore_index, self.reduction, self.label_smoothing)


class BatchNorm(nn.Module):
    """For `torch.nn.BatchNorm1d`, `BatchNorm2d` and `BatchNorm3d`."""

    has_backward: bool = True
    can_torch_compile: bool = True

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    num_batches_tracked: torch.Tensor | None
    track_running_stats: bool
    momentum: float | None
    eps: float

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        momentum = 0.0 if self.momentum is None else self.momentum
        tracks = self.training and self.track_running_stats
        if tracks and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the plain average over all batches
                momentum = 1.0 / float(self.num_batches_tracked)
        of_batch = self.training or (self.running_mean is None and self.running_var is None)
        running = (self.running_mean, self.running_var) if tracks or not of_batch else (None, None)
        return batch_norm(input, *running, self.weight, self.bias, of_batch, momentum, self.eps)


__all__ = ["BatchNorm", "CrossEntropyLoss", "Softmax"]

"""Modules of losses: PyTorch's arguments and state, and the extras of `hw3gpu.functional`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import functional
from .tools import Proxy, Unscripted, as_leaf

__all__ = ["CrossEntropyLoss", "LinearCrossEntropyLoss"]


class _Extras(Unscripted):
    """The arguments that losses have beyond PyTorch's: those of `functional.cross_entropy` by keyword. No part of the state.

    `token_weight` and `normalizer`, which belong to a batch, go to the call.
    """

    extras: dict[str, Any] = {}  # noqa: RUF012  of a module that was pickled without
    _names: tuple[str, ...] = ("z_loss", "softcap", "gradient", "all_ignored", "return_stats", "differentiable")
    _names += ("loss_dtype", "logit_scale")
    _loss: Callable[..., Any]  # of (input, target, **options), the function of `functional` that a module is

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        extras = {name: kwargs.pop(name) for name in self._names if name in kwargs}
        super().__init__(*args, **kwargs)
        self.extras = extras

    def forward(
        self, input: Tensor, target: Tensor, *, token_weight: Tensor | None = None, normalizer: float | Tensor | None = None
    ) -> Any:
        """The loss for classes or probabilities `target`, of logits `input` or of those that `linear` makes of it; (loss,
        statistics) with `return_stats`."""
        of_rows: dict[str, Any] = {"token_weight": token_weight, "normalizer": normalizer}
        if isinstance(input, Proxy):
            return as_leaf(self, input, target, **of_rows)
        of: Any = self
        return self._loss(
            input, target, weight=of.weight, ignore_index=of.ignore_index, reduction=of.reduction,
            label_smoothing=of.label_smoothing, **self.extras, **of_rows,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return ", ".join([*filter(None, [super().extra_repr()]), *(f"{k}={v!r}" for k, v in self.extras.items())])


class CrossEntropyLoss(_Extras, torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` on this library's kernels; also takes the keyword extras of `functional.cross_entropy`."""

    def _loss(self, input: Tensor, target: Tensor, **options: Any) -> Any:
        return functional.cross_entropy(input, target, **options)


class LinearCrossEntropyLoss(_Extras, torch.nn.LinearCrossEntropyLoss):
    """`torch.nn.LinearCrossEntropyLoss` on this library's kernels; also takes the keyword extras of
    `functional.linear_cross_entropy`."""

    _names = (*_Extras._names, "chunk_rows")

    def _loss(self, input: Tensor, target: Tensor, **options: Any) -> Any:
        shape, b = (self.num_classes, *self.out_features), self.linear.bias
        W, bias = self.linear.weight.reshape(*shape, self.linear.in_features), None if b is None else b.reshape(shape)
        return functional.linear_cross_entropy(input, W, target, linear_bias=bias, options=self.options, **options)

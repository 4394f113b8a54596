"""Modules of losses: PyTorch's arguments and state, and the extras of `hw3gpu.functional`."""

from __future__ import annotations

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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        extras = {name: kwargs.pop(name) for name in self._names if name in kwargs}
        super().__init__(*args, **kwargs)
        self.extras = extras

    def extra_repr(self) -> str:
        return ", ".join([*filter(None, [super().extra_repr()]), *(f"{k}={v!r}" for k, v in self.extras.items())])


class CrossEntropyLoss(_Extras, torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` on this library's kernels; also takes the keyword extras of `functional.cross_entropy`."""

    def forward(
        self, input: Tensor, target: Tensor, *, token_weight: Tensor | None = None, normalizer: float | Tensor | None = None
    ) -> Any:
        """The loss of logits `input` for classes or probabilities `target`; (loss, statistics) with `return_stats`."""
        of_rows: dict[str, Any] = {"token_weight": token_weight, "normalizer": normalizer}
        if isinstance(input, Proxy):
            return as_leaf(self, input, target, **of_rows)
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            **self.extras,
            **of_rows,
        )


class LinearCrossEntropyLoss(_Extras, torch.nn.LinearCrossEntropyLoss):
    """`torch.nn.LinearCrossEntropyLoss` on this library's kernels; also takes the keyword extras of
    `functional.linear_cross_entropy`."""

    _names = (*_Extras._names, "chunk_rows")

    def forward(
        self, input: Tensor, target: Tensor, *, token_weight: Tensor | None = None, normalizer: float | Tensor | None = None
    ) -> Any:
        """The loss of the logits of `input` for classes or probabilities; (loss, statistics) with `return_stats`."""
        of_rows: dict[str, Any] = {"token_weight": token_weight, "normalizer": normalizer}
        if isinstance(input, Proxy):
            return as_leaf(self, input, target, **of_rows)
        C, D, bias = self.num_classes, self.linear.in_features, self.linear.bias
        return functional.linear_cross_entropy(
            input,
            self.linear.weight.reshape(C, *self.out_features, D),
            target,
            linear_bias=None if bias is None else bias.reshape(C, *self.out_features),
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            options=self.options,
            **self.extras,
            **of_rows,
        )

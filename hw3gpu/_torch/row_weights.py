"""A weight a row, and a divisor that the caller knows, for a loss of rows: docs/derivations.md, section 3.11.

    ℓ = Σ_n v_n ℓ_n / d,   d = normalizer, else Σ_n v_n w_n for 'mean' and 1 for 'sum'

The losses of the rows are weighed and added by PyTorch's operations, and the rows' upstream gradients u v_n / d go to the
kernels: numbers of rows, in the precision of the sums, and no pass more over the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cross_entropy_formula import Options, counts, reduced


class RowWeights(NamedTuple):
    """token_weight: a number a row, or None; normalizer: a tensor (), or None. Both in the precision of the sums."""

    token_weight: Tensor | None
    normalizer: Tensor | None


def reduced_by(
    call: Callable[[Options], tuple[Tensor, Any]], options: Options, target: Tensor, weight: Tensor | None, by: RowWeights
) -> tuple[Tensor, Any]:
    """(loss, statistics) by `call`, which gives the losses of all rows, or their sum, as its options' reduction says."""
    asked = options if by.normalizer is None or options.reduction == "none" else options._replace(reduction="sum")
    if by.token_weight is None:
        loss, stats = call(asked)
    else:
        loss, stats = call(options._replace(reduction="none"))
        loss = reduced(loss, *_kept(target, options), weight, asked, by.token_weight)
    return loss if by.normalizer is None else loss / by.normalizer, stats


def weighed(loss: Tensor, w_t: Tensor, options: Options, by: RowWeights) -> Tensor:
    """The reduction by these of the losses of rows, or of their sum; w_t: the weights of the rows' targets, 0 where ignored."""
    if by.token_weight is not None:
        asked = options._replace(reduction="sum") if by.normalizer is not None and options.reduction != "none" else options
        loss = reduced(loss, w_t != 0, w_t, None, asked, by.token_weight, counted=w_t)
    return loss if by.normalizer is None else loss / by.normalizer


def known_factors(by: RowWeights, options: Options, target: Tensor, weight: Tensor | None, rows: Tensor) -> Tensor | None:
    """v_n / d of every row, in the shape of `rows`, where they are known before the losses are; None where they are learnt.

    With them a sum is what is asked for, and its gradient can be written with the losses.
    """
    if options.reduction == "none" or not rows.numel():  # of no rows the quotient is that of the sums
        return None
    if any(v is not None and v.requires_grad for v in by):
        return None
    v = torch.ones_like(rows) if by.token_weight is None else by.token_weight
    divisor = by.normalizer
    if divisor is None and options.reduction == "mean":
        divisor = (v * counts(*_kept(target, options), weight, rows)).sum()
        if options.zero_if_ignored:
            divisor = torch.where(divisor == 0, torch.inf, divisor)
    return (v if divisor is None else v / divisor).contiguous()


def _kept(target: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """(which rows are not ignored, target)."""
    if target.is_floating_point():
        return torch.ones((), dtype=torch.bool, device=target.device), target
    target = target.long()  # in fewer bits PyTorch wraps the number that it is compared with
    return target != options.ignore_index, target

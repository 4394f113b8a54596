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

from .cross_entropy_formula import Options, reduced


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
        soft = target.is_floating_point()
        target = target if soft else target.long()  # in fewer bits PyTorch wraps the number that it is compared with
        kept = torch.ones((), dtype=torch.bool, device=target.device) if soft else target != options.ignore_index
        loss = reduced(loss, kept, target, weight, asked, by.token_weight)
    return loss if by.normalizer is None else loss / by.normalizer, stats


def weighed(loss: Tensor, w_t: Tensor, options: Options, by: RowWeights) -> Tensor:
    """The reduction by these of the losses of rows, or of their sum; w_t: the weights of the rows' targets, 0 where ignored."""
    if by.token_weight is not None:
        asked = options._replace(reduction="sum") if by.normalizer is not None and options.reduction != "none" else options
        loss = reduced(loss, w_t != 0, w_t, None, asked, by.token_weight, counted=w_t)
    return loss if by.normalizer is None else loss / by.normalizer

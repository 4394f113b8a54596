"""Cross entropy with statistics that have a graph: docs/derivations.md, section 3.6."""

from __future__ import annotations

import torch
from torch import Tensor

from . import class_range, cross_entropy_formula, operators, token_log_probs
from .cross_entropy_formula import CrossEntropyStatistics, Options, class_axis
from .token_log_probs import TokenLogProbs


def loss_and_statistics(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: Options
) -> tuple[Tensor, CrossEntropyStatistics | None]:
    """(loss, CrossEntropyStatistics), both with a graph; the arguments are checked, weight is in the kernels' dtype.

    Of classes without smoothing and softcap the loss is that of `token_log_probs`: one pass for both. The rest is computed by
    the formula in PyTorch's operations.
    """
    if target.is_floating_point() or options.label_smoothing or options.softcap is not None or operators.transformed():
        if not (operators.traced(logits) or operators.transformed()):
            class_range.check_classes(target, logits.shape[class_axis(logits)], options.ignore_index)
        return cross_entropy_formula.loss_and_statistics(logits, target, weight, options, True)
    axis = class_axis(logits)
    found, sums = token_log_probs.with_sums(logits, target, 1.0 / options.logit_scale, options.ignore_index, axis)
    assert sums is not None
    predicted = logits.detach().argmax(axis)
    return of_token_log_probs(found, sums[3].view(target.shape), target, weight, options, predicted)


def of_token_log_probs(
    found: TokenLogProbs, below: Tensor, target: Tensor, weight: Tensor | None, options: Options,
    predicted: Tensor,
) -> tuple[Tensor, CrossEntropyStatistics]:  # fmt: skip
    """(loss, CrossEntropyStatistics) of classes, from the three numbers of every row, z_target - max z and the arg max."""
    target = target.long()  # in fewer bits PyTorch wraps the number that it is compared with, and takes uint8 for a mask
    kept, loss = target != options.ignore_index, -found.log_prob
    if weight is not None:
        w_t = torch.where(kept, weight[torch.where(kept, target, 0)], 0.0)
        loss = torch.where(w_t == 0, 0.0, w_t * loss)  # 0 · ∞ = 0
    if options.z_loss:
        loss = loss + options.z_loss * found.lse**2
    loss = cross_entropy_formula.reduced(loss, kept, target, weight, options)
    correct, predicted = (below == 0) & kept, torch.where(kept, predicted, -1)
    return loss, CrossEntropyStatistics(found.lse, found.log_prob, found.entropy, correct, predicted)

"""Cross entropy by one of three ways.

Eager: an autograd function around kernels, or kernels alone where no graph is needed. Traced: operators around the same
functions. Inside `torch.func` transforms and in forward mode: the formula in PyTorch's operations.
"""

from __future__ import annotations

import torch

from . import _cross_entropy_autograd, _cross_entropy_formula, _cross_entropy_graphs, _ops, _token_log_probs
from ._autograd import graph_is_needed
from ._cross_entropy_formula import NUMBERS, CrossEntropyStatistics, class_axis, loss_shape, without_derivatives


def call_of(logits, target, weight, options, gradient, stats, dtype):
    """What `_bound` knows of a call with these arguments, of which only the kinds of the first two are checked."""
    return _cross_entropy_autograd.call_of(logits, target, weight, options, gradient, NUMBERS if stats else 3, dtype)


def cross_entropy(logits, target, weight, options, gradient, stats, dtype=None, call=None):
    """(loss, CrossEntropyStatistics or None); the arguments are checked, weight is in the kernels' dtype.

    dtype: of the loss of CUDA tensors; others have that of its sums. `call`: what `_bound` knows of it.
    """
    with_graph = False
    if call is None and _ops.traced(logits):
        found = _cross_entropy_graphs.traced(logits, target, weight, options, NUMBERS if stats else 3)
    elif call is None and _ops.transformed():
        return _cross_entropy_formula.loss_and_statistics(logits, target, weight, options, stats)
    elif not (with_graph := graph_is_needed(logits, target)):
        found = _cross_entropy_autograd.run(logits, target, weight, options, NUMBERS if stats else 3, False, dtype, call)
    else:
        found = _cross_entropy_autograd.with_graph(logits, target, weight, options, gradient, stats, dtype, call)
    if not stats:
        return found[0], None
    V = logits.shape[class_axis(logits)]
    of_rows = _cross_entropy_formula.statistics(found[1], loss_shape(logits), V, target, options.ignore_index)
    return found[0], without_derivatives(of_rows, logits, target) if with_graph else of_rows


def with_differentiable_statistics(logits, target, weight, options):
    """(loss, CrossEntropyStatistics), both with a graph; the arguments are checked, weight is in the kernels' dtype.

    Of classes without smoothing and softcap the loss is that of `token_log_probs`: one pass for both. The rest is computed by
    the formula in PyTorch's operations.
    """
    if target.is_floating_point() or options.label_smoothing or options.softcap is not None or _ops.transformed():
        return _cross_entropy_formula.loss_and_statistics(logits, target, weight, options, True)
    found, sums = _token_log_probs.with_sums(logits, target, 1.0, options.ignore_index, class_axis(logits))
    return of_token_log_probs(found, sums[3].view(target.shape), target, weight, options)


def of_token_log_probs(found, below, target, weight, options):
    """(loss, CrossEntropyStatistics) of classes, from the three numbers of every row and z_target - max z."""
    kept, loss = target != options.ignore_index, -found.log_prob
    if weight is not None:
        w_t = torch.where(kept, weight[torch.where(kept, target, 0)], 0.0)
        loss = torch.where(w_t == 0, 0.0, w_t * loss)  # 0 · ∞ = 0
    if options.z_loss:
        loss = loss + options.z_loss * found.lse**2
    loss = _cross_entropy_formula.reduced(loss, kept, target, weight, options)
    return loss, CrossEntropyStatistics(found.lse, found.log_prob, found.entropy, (below == 0) & kept)

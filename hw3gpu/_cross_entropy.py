"""Cross entropy by one of three ways.

Eager: an autograd function around kernels, or kernels alone where no graph is needed. Traced: operators around the same
functions. Inside `torch.func` transforms and in forward mode: the formula in PyTorch's operations.
"""

from __future__ import annotations

from . import _cross_entropy_autograd, _cross_entropy_formula, _cross_entropy_graphs, _ops
from ._autograd import graph_is_needed
from ._cross_entropy_formula import NUMBERS, class_axis, loss_shape


def call_of(logits, target, weight, options, gradient, stats, dtype):
    """What `_bound` knows of a call with these arguments, of which only the kinds of the first two are checked."""
    return _cross_entropy_autograd.call_of(logits, target, weight, options, gradient, NUMBERS if stats else 3, dtype)


def cross_entropy(logits, target, weight, options, gradient, stats, dtype=None, call=None):
    """(loss, CrossEntropyStatistics or None); the arguments are checked, weight is in the kernels' dtype.

    dtype: of the loss of CUDA tensors; others have that of its sums. `call`: what `_bound` knows of it.
    """
    if call is None and _ops.traced(logits):
        found = _cross_entropy_graphs.traced(logits, target, weight, options, NUMBERS if stats else 3)
    elif call is None and _ops.transformed():
        return _cross_entropy_formula.loss_and_statistics(logits, target, weight, options, stats)
    elif not graph_is_needed(logits, target):
        found = _cross_entropy_autograd.run(logits, target, weight, options, NUMBERS if stats else 3, False, dtype, call)
    else:
        found = _cross_entropy_autograd.with_graph(logits, target, weight, options, gradient, stats, dtype, call)
    if not stats:
        return found[0], None
    V = logits.shape[class_axis(logits)]
    return found[0], _cross_entropy_formula.statistics(found[1], loss_shape(logits), V, target, options.ignore_index)

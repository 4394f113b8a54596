"""Checks of the arguments of losses over divided classes, before anything is allocated or sent."""

from __future__ import annotations

from torch import Tensor

from .._core import check
from . import dtensor
from .arguments import REDUCTIONS, class_weights, features, floating_tensor, like_input, linear_problem, same_device, tensor
from .cross_entropy_formula import Options
from .linear_chunks import Problem


def cross_entropy(
    z: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
) -> Tensor | None:
    """Checks every argument that PyTorch's function has; the class weights in the kernels' dtype."""
    for name, v in (("logits_shard", z), ("target", target), ("weight", weight)):
        dtensor.refuse(v, name)
    floating_tensor(z, "logits_shard")
    tensor(target, "target")
    check.integer(target, "target")
    check.rank_at_least(z, "logits_shard", 1, "(V_r,), (N, V_r) or (N, V_r, d1, …)")
    axis = min(z.dim() - 1, 1)
    check.shape(target, "target", (*z.shape[:axis], *z.shape[axis + 1 :]), "one class per row of logits_shard")
    same_device(target, "target", z, "logits_shard")
    if weight is not None:
        weight = class_weights(weight, z.shape[axis], z, "logits_shard", "class of logits_shard")
    check.integer_value(ignore_index, "ignore_index")
    check.one_of(reduction, "reduction", REDUCTIONS)
    check.real_value(label_smoothing, "label_smoothing")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected a number from 0 to 1, got {label_smoothing}")
    return weight


def token_log_probs(z: Tensor, target: Tensor) -> None:
    """Checks the shapes (…, V_r) and (…), which the loss of rows is not given."""
    for name, v in (("logits_shard", z), ("target", target)):
        dtensor.refuse(v, name)
        tensor(v, name)
    check.rank_at_least(z, "logits_shard", 1, "…, V_r")
    check.shape(target, "target", tuple(z.shape[:-1]), "one class per row of logits_shard")


def linear_cross_entropy(
    x: Tensor, W: Tensor, target: Tensor, b: Tensor | None, weight: Tensor | None, asked: Options, vocab_start: int | None
) -> Problem:
    """The `Problem` of this process's classes, its parts checked."""
    of = {"input": x, "linear_weight": W, "target": target, "linear_bias": b, "weight": weight}
    for name, v in of.items():
        dtensor.refuse(v, name)
    floating_tensor(x, "input")
    floating_tensor(W, "linear_weight")
    features(x, W, "(V_r, D)")
    like_input(x, W, b)
    tensor(target, "target")
    check.integer(target, "target")
    check.shape(target, "target", tuple(x.shape[:-1]), "one class per row of input")
    rows = x.reshape(target.numel(), x.shape[-1])
    logits = x.detach().new_empty(()).expand(len(rows), len(W))
    cross_entropy(logits, target.reshape(-1), None, asked.ignore_index, asked.reduction, asked.label_smoothing)
    first_class(vocab_start)
    if weight is not None:
        weight = class_weights(weight, len(W), x, "input", "row of linear_weight")
    return linear_problem(rows, W, target.reshape(-1), b, weight)


def first_class(vocab_start: int | None) -> None:
    """Checks the number of the first class here."""
    if vocab_start is not None and check.integer_value(vocab_start, "vocab_start") < 0:
        raise ValueError(f"vocab_start: expected at least 0, got {vocab_start}")

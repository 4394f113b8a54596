"""How the operators run on DTensors: each process its own rows, with no collective, wherever rows are what is divided.

Registered with PyTorch once, when the first DTensor is met. Divided classes are none of these: `dtensor`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

# A placement a tensor, in the order of the operator's schema. Of a division of the logits along d: a number is an axis of this
# tensor, "d" the axis d, "r" that axis among the rows (without the classes), "t" that of a target (classes or probabilities),
# "s" that axis of (k, N, S) numbers of rows, "+" a sum over processes, "." the same everywhere.
_ROWS = {
    "cross_entropy": ("r s .", "d t ."),
    "cross_entropy_backward": ("d", "r d t . s ."),
    "token_log_probs": ("r r r s", "d r"),
    "token_log_probs_backward": ("d", "r r r d r s"),
    "divergences": ("r s", "d d r"),
    "divergences_backward": ("d d", "r d d r s"),
}
# of logits that are products, whose rows are (N, 1): d = 0
_LINEAR = {
    "linear_cross_entropy": ("0 1 .", "0 . . 0 ."),
    "linear_cross_entropy_backward": ("0 + + 0", "0 0 . . 0 . 1 ."),
    "linear_token_log_probs": ("0 0 0 1 0", "0 . . 0"),
    "linear_token_log_probs_backward": ("0 + +", "0 0 0 0 . . 0 1"),
    "linear_divergences": ("0 1", "0 . . 0 . . 0"),
    "linear_divergences_backward": ("0 + + 0 + +", "0 0 . . 0 . . 0 1"),
}
_SOFTMAX = {"softmax": ("d", "d"), "softmax_backward": ("d", "d d")}

Acceptable = list[tuple[list[Any], list[Any]]]


@cache
def register() -> None:
    """Tells PyTorch what of the operators' tensors may be divided; the rest it gathers first."""
    for table, divisions in ((_ROWS, _along_rows), (_LINEAR, _along_the_first), (_SOFTMAX, _along_all_but_one)):
        for name, (results, operands) in table.items():
            op = getattr(torch.ops.hw3gpu, name).default
            register_sharding(op)(_strategy(op, results.split(), operands.split(), divisions))


def _strategy(
    op: Any, results: Sequence[str], operands: Sequence[str], divisions: Callable[..., Any]
) -> Callable[..., Acceptable]:
    """What PyTorch asks: the placements that fit together, of results and of arguments, None for what is no tensor."""

    def acceptable(*args: Any) -> Acceptable:
        def of(placed: dict[str, Any]) -> tuple[list[Any], list[Any]]:
            tensors = [placed[name] if hasattr(arg, "placements") else None for name, arg in zip(operands, args, strict=False)]
            return [placed[name] for name in results], tensors + [None] * (len(args) - len(tensors))

        same: dict[str, Any] = dict.fromkeys([*results, *operands], Replicate())
        return [of(same), *(of(placed) for placed in divisions(op, operands, args))]

    return acceptable


def _placed(**axes: int) -> dict[str, Any]:
    return {
        "0": Shard(0),
        "1": Shard(1),
        "+": Partial(),
        ".": Replicate(),
        **{name: Shard(axis) for name, axis in axes.items()},
    }


def _logits(operands: Sequence[str], args: Sequence[Any]) -> Any:
    return args[operands.index("d")]


def _named(op: Any, args: Sequence[Any], name: str) -> Any:
    return next((v for arg, v in zip(op._schema.arguments, args, strict=True) if arg.name == name), None)


def _along_rows(op: Any, operands: Sequence[str], args: Sequence[Any]) -> list[dict[str, Any]]:
    """The axes before the classes, and the one behind them: by these (k, N, S) numbers of rows are divided too."""
    logits, dim, reduction = _logits(operands, args), _named(op, args, "dim"), _named(op, args, "reduction")
    if reduction not in (None, "none"):
        return []
    dim = min(logits.ndim - 1, 1) if dim is None else dim
    if reduction is not None:  # of cross entropy the numbers of rows are looked at, too, which are to be in order
        before = range(min(dim, 1))
    else:
        before = range(dim)
    soft = "t" in operands and args[operands.index("t")].ndim == logits.ndim
    found = [_placed(d=d, r=d, t=d, s=1) for d in before]
    if dim + 1 < logits.ndim:
        found.append(_placed(d=dim + 1, r=dim, t=dim + soft, s=2))
    return found


def _along_the_first(op: Any, operands: Sequence[str], args: Sequence[Any]) -> list[dict[str, Any]]:
    return [_placed()] if _named(op, args, "reduction") in (None, "none") else []


def _along_all_but_one(op: Any, operands: Sequence[str], args: Sequence[Any]) -> list[dict[str, Any]]:
    z, dim = _logits(operands, args), _named(op, args, "dim")
    return [_placed(d=d) for d in range(z.ndim) if d != dim % z.ndim]

"""Every public function with good arguments and the shape of its result, for `spoilt_arguments.py`."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Function(NamedTuple):
    """A public function, a maker of good arguments by name, and the shapes of its result."""

    call: Callable[..., Any]
    good: Callable[[random.Random], dict[str, Any]]
    shapes: Callable[[dict[str, Any], Any], bool]


def shape_is(*pairs: tuple[Any, Any]) -> bool:
    return all(tuple(x.shape) == tuple(expected) for x, expected in pairs)


def functions() -> dict[str, Function]:
    import torch
    import torch.distributed as dist

    import hw3gpu
    import hw3gpu.functional as HF
    from hw3gpu import distributed, nn

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    values = np.random.default_rng(0).standard_normal(4096)

    def array(rng: random.Random, shape: Any, positive: bool = False) -> Any:
        """Of NumPy or torch, of any dtype that the array functions take."""
        x = np.resize(values, shape).astype(rng.choice(["float64", "float32", "float16"]))
        x = np.abs(x) + x.dtype.type(0.25) if positive else x
        return x

    def tensor(rng: random.Random, shape: Any, dtype: Any = None, positive: bool = False) -> Any:
        dtype = dtype or rng.choice([torch.float64, torch.float32, torch.bfloat16, torch.float16])
        x = torch.from_numpy(np.resize(values, shape).copy()).to(dtype)
        x = x.abs() + 0.25 if positive else x
        return x.requires_grad_(rng.random() < 0.3)

    def sizes(rng: random.Random, n: int) -> list[int]:
        return [rng.choice([1, 2, 3, 4]) for _ in range(n)]

    def either(rng: random.Random, arguments: dict[str, Any]) -> dict[str, Any]:
        """All NumPy, or all torch."""
        if rng.random() < 0.5:
            return arguments
        return {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}

    def batch(rng: random.Random) -> dict[str, Any]:
        x = array(rng, sizes(rng, rng.choice([2, 3, 4])))
        like = {name: np.resize(values, x.shape[1]).astype(x.dtype) for name in ("gamma", "beta")}
        return either(rng, {"x": x, **like, "eps": 1e-5, "channel_axis": 1})

    def batch_backward(rng: random.Random) -> dict[str, Any]:
        given = batch(rng)
        del given["beta"]
        as_given = given["gamma"] * 0 + 1
        return {"dy": given["x"], "mean": as_given, "var": as_given, **given, "return_dx_hat": True}

    def rows(name: str, other: str | None = None, axis: bool = True) -> Callable[[random.Random], dict[str, Any]]:
        def good(rng: random.Random) -> dict[str, Any]:
            x = array(rng, sizes(rng, rng.choice([1, 2, 3])), positive=other == "y_hat")
            return either(rng, {name: x, **({other: x.copy()} if other else {}), **({"axis": -1} if axis else {})})

        return good

    def classes(rng: random.Random) -> dict[str, Any]:
        x = array(rng, sizes(rng, rng.choice([1, 2, 3])))
        y = x if rng.random() < 0.3 else np.zeros(x.shape[:-1], rng.choice(["int64", "int32", "uint8"]))
        return either(rng, {"z": x, "y": y})

    def square(rng: random.Random) -> Any:
        m = rng.choice([1, 2, 3, 5])
        a = np.resize(values, (*rng.choice([(), (), (2,), (0,)]), m, m + 1))
        return (a @ a.swapaxes(-1, -2)).astype(rng.choice(["float64", "float32"]))

    def points(rng: random.Random) -> Any:
        return np.resize(values, sizes(rng, rng.choice([2, 2, 3]))).astype(rng.choice(["float64", "float32"]))

    def given_moments(rng: random.Random) -> dict[str, Any]:
        sigma = square(rng)
        given = {"mean": sigma[..., 0].copy(), "covariance": sigma, "n": rng.choice([None, 7]), "ddof": 0}
        return either(rng, {**given, "rng": rng.choice([None, 3])})

    def trace(rng: random.Random) -> dict[str, Any]:
        given = {"covariance": square(rng), "k": 1, "largest": False, "dtype": None, "method": "auto", "certify": True}
        return either(rng, given)

    def accumulate(m: Any, points: Any, ddof: Any) -> Any:
        return hw3gpu.MomentAccumulator(m).update(points).moments(ddof=ddof)

    def torch_batch(rng: random.Random) -> dict[str, Any]:
        x = tensor(rng, [2, *sizes(rng, rng.choice([1, 2, 3]))])
        vector = {name: torch.ones(x.shape[1], dtype=x.dtype) for name in ("running_mean", "running_var", "weight", "bias")}
        given = {"input": x, **vector, "training": rng.random() < 0.5, "momentum": 0.1, "eps": 1e-5}
        given |= {"residual": rng.choice([None, x.detach().clone()]), "activation": rng.choice([None, "relu"])}
        mask = rng.choice([None, torch.rand(x.shape[0], *x.shape[2:]) < 0.5])
        lengths = torch.tensor([x.shape[2], 0]) if mask is None and x.dim() == 3 else None
        return {**given, "mask": mask, "lengths": lengths}

    def loss_options(rng: random.Random, C: int, dtype: Any) -> dict[str, Any]:
        given = {"weight": rng.choice([None, torch.ones(C, dtype=dtype)]), "ignore_index": -100, "reduction": "mean"}
        given |= {"label_smoothing": rng.choice([0.0, 0.1]), "z_loss": 0.0, "softcap": rng.choice([None, 30.0])}
        stats = rng.random() < 0.3
        given |= {"loss_dtype": rng.choice([None, torch.float32]), "normalizer": rng.choice([None, 3.0, torch.tensor(2)])}
        return {**given, "gradient": "auto", "all_ignored": "nan", "return_stats": stats, "differentiable": stats}

    def loss(rng: random.Random) -> dict[str, Any]:
        x = tensor(rng, sizes(rng, rng.choice([1, 2, 3])))
        C = x.shape[min(x.dim() - 1, 1)]
        rows_of = () if x.dim() == 1 else (x.shape[0], *x.shape[2:])
        target = torch.zeros(rows_of, dtype=torch.int64) if rng.random() < 0.7 else torch.full(x.shape, 0.3, dtype=x.dtype)
        token_weight = rng.choice([None, torch.ones(rows_of)])
        return {"input": x, "target": target, "token_weight": token_weight, **loss_options(rng, C, x.dtype)}

    def linear_loss(rng: random.Random) -> dict[str, Any]:
        N, C, D = sizes(rng, 3)
        rows_of = rng.choice([(N,), (2, N)])
        x = tensor(rng, (*rows_of, D))
        W = tensor(rng, (C, D), x.dtype)
        given = {"input": x, "linear_weight": W, "target": torch.zeros(rows_of, dtype=torch.int64)}
        given["token_weight"] = rng.choice([None, torch.ones(rows_of)])
        given["linear_bias"] = rng.choice([None, torch.ones(C, dtype=x.dtype)])
        return {**given, **loss_options(rng, C, x.dtype), "options": None, "chunk_rows": rng.choice([None, 1])}

    def tokens(rng: random.Random) -> dict[str, Any]:
        x = tensor(rng, sizes(rng, rng.choice([1, 2, 3])))
        given = {"logits": x, "target": torch.zeros(x.shape[:-1], dtype=torch.int64)}
        return {**given, "temperature": 0.7, "ignore_index": -100, "dim": -1}

    def linear_tokens(rng: random.Random) -> dict[str, Any]:
        given = {k: v for k, v in linear_loss(rng).items() if k in ("input", "linear_weight", "target", "linear_bias")}
        return {**given, "temperature": 0.7, "ignore_index": -100, "chunk_rows": None}

    def teachings(rng: random.Random) -> dict[str, Any]:
        x = tensor(rng, sizes(rng, rng.choice([1, 2, 3])))
        given = {"student": x, "teacher": torch.zeros_like(x, requires_grad=False), "temperature": 0.7, "kind": "forward"}
        given |= {"beta": 0.5, "teacher_is": "logits", "mask": rng.choice([None, torch.ones(x.shape[:-1], dtype=torch.bool)])}
        given |= {"top_k": rng.choice([None, 1])}
        return {**given, "reduction": "none", "dim": -1}

    def linear_teachings(rng: random.Random) -> dict[str, Any]:
        of = {k: v for k, v in linear_loss(rng).items() if k in ("input", "linear_weight")}
        given = {f"{side}_{k.removeprefix('linear_')}": v for side in ("student", "teacher") for k, v in of.items()}
        given |= {"student_bias": None, "teacher_bias": None, "temperature": 0.7, "kind": "reverse", "beta": 0.5}
        return {**given, "mask": None, "reduction": "none", "chunk_rows": None}

    def sharded(rng: random.Random) -> dict[str, Any]:
        x = tensor(rng, sizes(rng, 2))
        given = {"logits_shard": x, "target": torch.zeros(len(x), dtype=torch.int64), "group": None}
        given |= {"weight": None, "ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0}
        return {**given, "z_loss": 0.0, "softcap": None, "vocab_start": rng.choice([None, 0])}

    def linear_sharded(rng: random.Random) -> dict[str, Any]:
        given = {k: v for k, v in linear_tokens(rng).items() if k != "temperature"}
        C, dtype = len(given["linear_weight"]), given["input"].dtype
        options = {k: v for k, v in loss_options(rng, C, dtype).items() if k != "differentiable"}
        return {**given, **options, "group": None, "vocab_start": rng.choice([None, 0])}

    def sharded_tokens(rng: random.Random) -> dict[str, Any]:
        given = tokens(rng)
        given = {"logits_shard": given.pop("logits"), **given, "group": None, "vocab_start": rng.choice([None, 0])}
        del given["dim"]
        return given

    def linear_sharded_tokens(rng: random.Random) -> dict[str, Any]:
        return {**linear_tokens(rng), "group": None, "vocab_start": rng.choice([None, 0])}

    def synchronised(rng: random.Random) -> dict[str, Any]:
        return {**torch_batch(rng), "group": None}

    def torch_trace(rng: random.Random) -> dict[str, Any]:
        sigma = torch.from_numpy(square(rng)).requires_grad_(rng.random() < 0.5)
        return {"covariance": sigma, "k": 1, "largest": False, "method": "auto"}

    def convolution(rng: random.Random) -> dict[str, Any]:
        return {
            "input_shape": (2, 9, 8, 3),
            "output_channels": 4,
            "kernel_size": (3, 2),
            "stride": 1,
            "padding": 0,
            "dilation": 1,
        }

    def transposed(rng: random.Random) -> dict[str, Any]:
        return {**convolution(rng), "output_padding": 0}

    def paddings(rng: random.Random) -> dict[str, Any]:
        return {"input_size": (9, 8), "output_size": (9, 8), "kernel_size": 3, "stride": 1, "dilation": 1}

    def module(make: Callable[..., Any]) -> Callable[..., Any]:
        """Of the constructor's arguments those that the forward pass looks at: the others are PyTorch's."""

        def call(input: Any, eps: Any, momentum: Any) -> Any:
            eps, momentum = (v.detach() if isinstance(v, torch.nn.Parameter) else v for v in (eps, momentum))  # registered else
            return make(3, eps=eps, momentum=momentum)(input)

        return call

    def moduled(rank: int) -> Callable[[random.Random], dict[str, Any]]:
        def good(rng: random.Random) -> dict[str, Any]:
            return {"input": tensor(rng, [2, 3, *sizes(rng, rank - 2)], torch.float32), "eps": 1e-5, "momentum": 0.1}

        return good

    def loss_module(input: Any, target: Any, token_weight: Any = None, normalizer: Any = None, **options: Any) -> Any:
        return nn.CrossEntropyLoss(**options)(input, target, token_weight=token_weight, normalizer=normalizer)

    def backend(name: Any) -> None:
        with hw3gpu.use_backend(name):
            pass

    def whatever(given: dict[str, Any], found: Any) -> bool:
        return True

    def same(name: str) -> Callable[[dict[str, Any], Any], bool]:
        return lambda g, y: tuple(y.shape) == tuple(g[name].shape) and type(y) in (np.ndarray, torch.Tensor)

    def of_batch(g: dict[str, Any], r: Any) -> bool:
        axis = g.get("channel_axis", 1)
        C = () if axis is None else (g["x"].shape[axis],)
        return shape_is((r.y, g["x"].shape), (r.mean, C), (r.var, C), (r.rstd, C))

    def of_batch_backward(g: dict[str, Any], r: Any) -> bool:
        axis = g.get("channel_axis", 1)
        C = () if axis is None else (g["x"].shape[axis],)
        return shape_is((r.dx, g["x"].shape), (r.dgamma, C), (r.dbeta, C), (r.dvar, C), (r.dmean, C))

    def of_points(g: dict[str, Any], x: Any) -> bool:
        shape = g["covariance"].shape
        n = x.shape[-2] if g.get("n") is None else operator.index(g["n"])
        return tuple(x.shape) == (*shape[:-2], n, shape[-1])

    def of_trace(name: str) -> Callable[[dict[str, Any], Any], bool]:
        def check(g: dict[str, Any], r: Any) -> bool:
            *stack, _, m = g[name].shape
            return shape_is((r.phi, (*stack, m, int(g["k"]))), (r.value, stack), (r.eigenvalues, (*stack, int(g["k"]))))

        return check

    def of_moments(g: dict[str, Any], r: Any) -> bool:
        *stack, _, m = g["points"].shape
        return shape_is((r.mean, (*stack, m)), (r.covariance, (*stack, m, m)))

    def of_loss(rows_of: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any], Any], bool]:
        def check(g: dict[str, Any], r: Any) -> bool:
            loss, stats = r if g.get("return_stats") else (r, None)
            rows = tuple(rows_of(g))
            right = tuple(loss.shape) == (rows if g.get("reduction", "mean") == "none" else ())
            return right and (stats is None or all(v is None or tuple(v.shape) == rows for v in stats))

        return check

    def rows_of_input(g: dict[str, Any]) -> Any:
        shape = g["input"].shape
        return () if len(shape) == 1 else (shape[0], *shape[2:])

    def of_rows(shape: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any], Any], bool]:
        return lambda g, r: r.shape == (shape(g) if g.get("reduction") == "none" else ())

    def of_tokens(g: dict[str, Any], r: Any) -> bool:
        return all(tuple(v.shape) == tuple(g["target"].shape) for v in r)

    return {
        "batch_norm": Function(hw3gpu.batch_norm, batch, of_batch),
        "batch_norm_backward": Function(hw3gpu.batch_norm_backward, batch_backward, of_batch_backward),
        "softmax": Function(hw3gpu.softmax, rows("z"), same("z")),
        "softmax_backward": Function(hw3gpu.softmax_backward, rows("dy", "y"), same("y")),
        "softmax_jacobian": Function(
            hw3gpu.softmax_jacobian, rows("z", axis=False), lambda g, y: shape_is((y, (*g["z"].shape, g["z"].shape[-1])))
        ),
        "cross_entropy": Function(
            hw3gpu.cross_entropy, rows("y", "y_hat", axis=False), lambda g, y: shape_is((y, g["y"].shape[:-1]))
        ),
        "softmax_cross_entropy": Function(
            hw3gpu.softmax_cross_entropy, classes,
            lambda g, r: shape_is((r.loss, g["z"].shape[:-1]), (r.dz, g["z"].shape)),
        ),
        "moments": Function(hw3gpu.moments, lambda rng: either(rng, {"points": points(rng), "ddof": 0}), of_moments),
        "points_with_moments": Function(hw3gpu.points_with_moments, given_moments, of_points),
        "minimize_trace": Function(hw3gpu.minimize_trace, trace, of_trace("covariance")),
        "minor_components": Function(
            hw3gpu.minor_components,
            lambda rng: either(rng, {"points": points(rng), "k": 1, "largest": False, "ddof": 0}), of_trace("points"),
        ),
        "MomentAccumulator": Function(
            accumulate, lambda rng: either(rng, {"m": None, "points": points(rng), "ddof": 0}), of_moments
        ),
        "conv2d_output_shape": Function(hw3gpu.conv2d_output_shape, convolution, lambda g, r: len(r) == 4),
        "conv_transpose2d_output_shape": Function(
            hw3gpu.conv_transpose2d_output_shape, transposed, lambda g, r: len(r) == 4
        ),
        "conv2d_padding_for": Function(hw3gpu.conv2d_padding_for, paddings, lambda g, r: len(r) == 2),
        "use_backend": Function(backend, lambda rng: {"name": "auto"}, whatever),
        "functional.batch_norm": Function(HF.batch_norm, torch_batch, same("input")),
        "functional.softmax": Function(
            HF.softmax, lambda rng: {"input": tensor(rng, sizes(rng, 2)), "dim": 1, "dtype": None}, same("input")
        ),
        "functional.cross_entropy": Function(HF.cross_entropy, loss, of_loss(rows_of_input)),
        "functional.linear_cross_entropy": Function(
            HF.linear_cross_entropy, linear_loss,
            of_loss(lambda g: (*g["input"].shape[:-1], *g["linear_weight"].shape[1:-1])),
        ),
        "functional.token_log_probs": Function(HF.token_log_probs, tokens, of_tokens),
        "functional.linear_token_log_probs": Function(HF.linear_token_log_probs, linear_tokens, of_tokens),
        "functional.distillation_loss": Function(
            HF.distillation_loss, teachings, of_rows(lambda g: g["student"].sum(operator.index(g.get("dim", -1))).shape)
        ),
        "functional.linear_distillation_loss": Function(
            HF.linear_distillation_loss, linear_teachings, of_rows(lambda g: g["student_input"].shape[:-1])
        ),
        "functional.minimize_trace": Function(HF.minimize_trace, torch_trace, of_trace("covariance")),
        "functional.check_targets": Function(HF.check_targets, lambda rng: {"device": None}, whatever),
        "distributed.sync_batch_norm": Function(distributed.sync_batch_norm, synchronised, same("input")),
        "distributed.vocab_parallel_cross_entropy": Function(
            distributed.vocab_parallel_cross_entropy, sharded,
            of_loss(lambda g: g["target"].shape),
        ),
        "distributed.vocab_parallel_linear_cross_entropy": Function(
            distributed.vocab_parallel_linear_cross_entropy, linear_sharded,
            of_loss(lambda g: g["target"].shape),
        ),
        "distributed.vocab_parallel_token_log_probs": Function(
            distributed.vocab_parallel_token_log_probs, sharded_tokens, of_tokens
        ),
        "distributed.vocab_parallel_linear_token_log_probs": Function(
            distributed.vocab_parallel_linear_token_log_probs, linear_sharded_tokens, of_tokens
        ),
        "nn.BatchNorm1d": Function(module(nn.BatchNorm1d), moduled(2), same("input")),
        "nn.BatchNorm2d": Function(module(nn.BatchNorm2d), moduled(4), same("input")),
        "nn.BatchNormAct2d": Function(module(nn.BatchNormAct2d), moduled(4), same("input")),
        "nn.CrossEntropyLoss": Function(loss_module, loss, of_loss(rows_of_input)),
        "nn.convert_batch_norm": Function(
            nn.convert_batch_norm, lambda rng: {"module": nn.BatchNorm1d(3), "sync": False}, whatever
        ),
    }  # fmt: skip

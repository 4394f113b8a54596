"""Results of ours beside PyTorch's own, for the tests of `hw3gpu.functional`."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import HealthCheck, settings

from hw3gpu._core.dispatch import requested_backend
from measure import close, max_error

drawn = settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ACC = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float32, "bfloat16": torch.float32}
SINGLE = {torch.float64: "float64", torch.float32: "float32"}


def tensor(values, dtype, device, grad=False):
    return torch.tensor(np.asarray(values), dtype=getattr(torch, dtype), device=device).requires_grad_(grad)


def values_of(t):
    return None if t is None else t.detach().double().cpu().numpy()


def hold(name, ours, expected, dtype, theirs, bound):
    """`close`, with PyTorch's error that of the tensor `theirs`."""
    close(values_of(ours), expected, max_error(values_of(theirs), expected, dtype), dtype, bound, name)


def same(ours, theirs, rtol=1e-12):
    """float64 results of the same function; NaN where PyTorch has NaN."""
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol, equal_nan=True, check_stride=False)


def layout_of(x, layout):
    if layout == "channels-last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":
        return torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0]
    return x


def gradcheck(function, inputs):
    """With the whole Jacobian; with the Triton kernels, whose interpreter is slow, along random directions.

    That a gradient which is not given counts as zeros is decided above the kernels: with the CPU kernels alone.
    """
    gpu = requested_backend() == "gpu"
    assert torch.autograd.gradcheck(function, inputs, fast_mode=gpu, check_undefined_grad=not gpu)


def gradgradcheck(function, inputs):
    """As `gradcheck`, of the gradients. With a graph these are computed by other operations: they are to be the same."""
    gpu = requested_backend() == "gpu"
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=gpu, check_undefined_grad=not gpu)
    results, leaves = function(*inputs), [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    results = [y for y in ([results] if isinstance(results, torch.Tensor) else results) if y.requires_grad]
    upstream = [torch.linspace(1, 2, y.numel(), dtype=y.dtype, device=y.device).view_as(y) for y in results]
    ours, with_graph = (
        torch.autograd.grad(results, leaves, upstream, retain_graph=True, create_graph=on) for on in (False, True)
    )
    for one, other in zip(ours, with_graph, strict=True):
        same(other.detach(), one, 1e-11)


def opcheck(operator, args, compiled=False):
    """The rules of `torch.library`: schema, autograd and fake tensors; `compiled`, through AOT dispatch too, which is dear."""
    rules = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, args, test_utils=(*rules, "test_aot_dispatch_dynamic") if compiled else rules)


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.int64)


def first_tile_minus_infinity(rng, V):
    z = rng.standard_normal((2, V))
    z[:, : V - 300] = -np.inf
    return z


# (2, V) logits on which a loss loses its digits, by what they are
HARD = {
    "first tile all -inf": first_tile_minus_infinity,
    "near -200": lambda rng, V: -200 + rng.standard_normal((2, V)),
    "near +1e4": lambda rng, V: 1e4 + 8 * rng.standard_normal((2, V)),
    "certain": lambda rng, V: np.where(np.arange(V) == V - 1, 90.0, rng.standard_normal((2, V))),
}

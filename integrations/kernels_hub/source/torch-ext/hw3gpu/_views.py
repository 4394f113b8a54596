"""Tensors as the kernels take them: (outer, axis, inner), on the current device."""

import contextlib
import math

import torch
import triton

_ACCUMULATED = {torch.float64: torch.float64, **dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float32)}

_INTERPRETED = triton.knobs.runtime.interpret  # as it was when the kernels were made


def check(name: str, x: torch.Tensor) -> None:
    """TypeError or ValueError unless the kernels can read x."""
    if x.dtype not in _ACCUMULATED:
        raise TypeError(f"{name}: expected float64, float32, float16 or bfloat16, got {x.dtype}")
    if not (x.is_cuda or _INTERPRETED):
        raise ValueError(f"{name}: expected a tensor on a GPU, got one on {x.device}")


def accumulate_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of sums over x."""
    return _ACCUMULATED[x.dtype]


def widened(x: torch.Tensor) -> bool:
    """True for halves inside autocast, where PyTorch computes softmax and losses in float32."""
    return x.dtype in (torch.float16, torch.bfloat16) and torch.is_autocast_enabled(x.device.type)


def on_device_of(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: x's, inside of this."""
    return torch.cuda.device_of(x)


def _sizes(x: torch.Tensor, dim: int) -> tuple:
    return math.prod(x.shape[:dim]), x.shape[dim], math.prod(x.shape[dim + 1 :])


def fold(x: torch.Tensor, dim: int) -> torch.Tensor:
    """x as (outer, x.shape[dim], inner): a view where strides allow it, else a contiguous copy."""
    return x.detach().resolve_neg().reshape(_sizes(x, dim))


def output(x: torch.Tensor, dim: int) -> torch.Tensor:
    """An empty tensor of x's shape and layout, of which `fold` is a view; contiguous where x's layout allows none."""
    out = torch.empty_like(x)
    try:
        out.view(_sizes(out, dim))
    except RuntimeError:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return out

"""Arrays of each kind and dtype from NumPy values, and back: what `hw3gpu verify` and the tests compute on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = Any

KINDS = ("numpy", "torch", "cupy")
DTYPES = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Place:
    """Arrays of one kind ('numpy', 'torch' or 'cupy') on one torch device ('cpu' or 'cuda')."""

    kind: str
    device: str

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The floating dtypes of this kind: bfloat16 is torch's alone."""
        return DTYPES if self.kind == "torch" else DTYPES[:3]

    def array(self, values: Any, dtype: str = "float32") -> Array:
        """`values` as a new array of this kind and `dtype`; a torch tensor keeps the strides where torch can."""
        values = np.array(values)
        if self.kind == "torch":
            import torch

            return torch.from_numpy(values).to(self.device, getattr(torch, dtype))
        if self.kind == "cupy":
            import cupy

            return cupy.asarray(values.astype(dtype))
        return values.astype(dtype)


def to_numpy(x: Array) -> np.ndarray:
    """`x`, of any kind and dtype, as a new float64 NumPy array."""
    if hasattr(x, "detach"):
        x = x.detach().double().cpu().numpy()
    elif type(x).__module__.partition(".")[0] == "cupy":
        x = x.get()
    return np.array(x, dtype=np.float64)


def to_torch(x: Array) -> Any:
    """A torch tensor of the values, dtype and device of `x`, sharing no memory and no graph with it."""
    import torch

    return torch.as_tensor(x).detach().clone()


def cupy_refusal() -> str | None:
    """Why CuPy arrays cannot be computed on here, or None when they can."""
    try:
        import cupy

        cupy.zeros(1)
    except ImportError as error:
        return f"CuPy cannot be imported ({error})"
    except Exception as error:  # CuPy's own errors cannot be named where it cannot be imported
        return f"CuPy finds no usable device ({error})"
    return None

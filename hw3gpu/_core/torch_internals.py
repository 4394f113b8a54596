"""What the library uses of PyTorch beyond its documented interface: all of it is here, because any release may change it.

`tests/test_internals.py` names each thing that a release has moved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

KNOWN = "2.11 to 2.14"

try:
    BatchNormBase = torch.nn.modules.batchnorm._BatchNorm
    ConvNd = torch.nn.modules.conv._ConvNd
    DispatchMode: Any = torch.utils._python_dispatch.TorchDispatchMode
    NormBase = torch.nn.modules.batchnorm._NormBase
    BelowAutograd: Any = torch._C._AutoDispatchBelowAutograd
    dispatch_modes: Any = torch._C._len_torch_dispatch_stack
    in_a_functorch_transform: Any = torch._C._are_functorch_transforms_active
    legacy_reduction: Any = torch.nn._reduction.legacy_get_string
    softmax_backward: Any = torch._softmax_backward_data
    tracing_state: Any = torch._C._get_tracing_state
    tree_map: Any = torch.utils._pytree.tree_map
    without_torch_function: Any = torch._C.DisableTorchFunctionSubclass
    wrapped_by_functorch: Any = torch._C._functorch.is_functorch_wrapped_tensor
    getattr(forward_ad, "_current_level")  # noqa: B009
except (ImportError, AttributeError) as error:
    raise ImportError(
        f"hw3gpu was made for PyTorch {KNOWN}, and PyTorch {torch.__version__} lacks what it uses of it: {error}"
    ) from error


def apply_of(function: type[torch.autograd.Function]) -> Any:
    """`function.apply` without its search for functorch's tensors, some 4 µs: for calls in which there are none."""
    base: Any = super(torch.autograd.Function, function)
    return base.apply


def not_looked_into(function: Any) -> Any:
    """Marks a function that a compiler is to call, for its result is a constant.

    As `torch.compiler.assume_constant_result` does, which imports the compiler, and with it Triton.
    """
    function._dynamo_marked_constant = True
    return function


def in_a_dual_level() -> bool:
    """True inside `torch.autograd.forward_ad.dual_level`."""
    return forward_ad._current_level >= 0


def process_group(name: Any) -> Any:
    """The process group of that name; a process group is given back."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)

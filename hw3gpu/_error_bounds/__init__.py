"""How far from the answer sheet rounding alone may take each element of a result: Σ count · u · |term|.

A companion of `reference`: a function here takes the arguments of the one of that name there, and `dtype`, that of the
sums, 'float32' or 'float64'; it returns the same tuple with bounds in place of results. The terms are summed in extended
precision. `u` is the unit roundoff of `dtype`; a count says how many roundings a term meets on its way into the result,
in whichever engine it meets more of them. docs/errors.md derives every count; none was fitted to what was measured.

The rounding of the result to its own dtype is not in the bound: `hw3gpu._cli.measure` adds it.
"""

from .channels import (
    activation,
    activation_backward,
    batch_norm,
    batch_norm_backward,
    batch_norm_inference,
    batch_norm_inference_backward,
)
from .points import minimize_trace, moments, points_with_moments
from .rounding import sum_of_products, unit_roundoff
from .rows import (
    cross_entropy,
    cross_entropy_with_options,
    distillation_loss,
    softmax,
    softmax_backward,
    softmax_cross_entropy,
    softmax_jacobian,
    token_log_probs,
)

__all__ = [
    "activation",
    "activation_backward",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_inference",
    "batch_norm_inference_backward",
    "cross_entropy",
    "cross_entropy_with_options",
    "distillation_loss",
    "minimize_trace",
    "moments",
    "points_with_moments",
    "softmax",
    "softmax_backward",
    "softmax_cross_entropy",
    "softmax_jacobian",
    "sum_of_products",
    "token_log_probs",
    "unit_roundoff",
]

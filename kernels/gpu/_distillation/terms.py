"""What one class adds to a divergence, without a difference that loses digits: docs/derivations.md, section 3.9."""

import triton
import triton.language as tl

from .._cross_entropy.tile import product_or_0


@triton.jit
def is_near(x) -> tl.tensor:
    """Where φ(x) is the series'; a NaN is not."""
    return tl.abs(x) <= 0.5


@triton.jit
def phi_near(x, ACC: tl.constexpr) -> tl.tensor:
    """φ(x) = e^x - 1 - x for |x| <= 1/2, by its series to half a unit in the last place."""
    if tl.float64 == ACC:
        y = 1 / 40320 + x * (1 / 362880 + x * (1 / 3628800 + x * (1 / 39916800 + x * (1 / 479001600 + x * (1 / 6227020800
            + x * (1 / 87178291200 + x / 1307674368000))))))  # fmt: skip
        y = 1 / 5040 + x * y
    else:
        y = 1 / 5040 + x / 40320
    return x * x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * y)))))


@triton.jit
def log1p(x, u, ACC: tl.constexpr) -> tl.tensor:
    """log(1 + x) with the digits of a small x, where u is 1 + x with those of a small u."""
    if tl.float64 == ACC:
        v = 1.0 + x
        of_small = tl.log(v) * tl.where(v == 1.0, 1.0, x / tl.where(v == 1.0, 1.0, v - 1.0))
        y = tl.where(v == 1.0, x, of_small)
    else:
        s = x / (2.0 + x)  # log(1 + x) = 2 artanh(s), whose series to s¹¹ leaves 4e-9 for |s| < 1/4
        s2 = s * s
        y = 2.0 * s * (1.0 + s2 * (1 / 3 + s2 * (1 / 5 + s2 * (1 / 7 + s2 * (1 / 9 + s2 * (1 / 11))))))
    return tl.where((x > -0.4) & (x < 0.66), y, tl.log(u))


@triton.jit
def log_ratio(base, other, shift, scale) -> tl.tensor:
    """(other - base) scale - shift of each class: 0 for one that other does not have, +∞ for one that base alone lacks."""
    return tl.where(other == float("-inf"), 0.0, (other - base) * scale - shift)


@triton.jit
def lacks(base, other) -> tl.tensor:
    """∞ for a class that base has and other does not: so is the divergence. Else 0."""
    return tl.where((other == float("-inf")) & (base > float("-inf")), float("inf"), 0.0)


@triton.jit
def minus_one(u, p, q, ACC: tl.constexpr) -> tl.tensor:
    """p (e^u - 1) = q - p with the digits of a small u."""
    return tl.where(is_near(u), product_or_0(p, u + phi_near(u, ACC)), q - p)


@triton.jit
def mixed_logs(u, ratio, beta, gamma, ACC: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """log(M/p) and log(M/q) for u = log(q/p) <= 0, M = β p + γ q, ratio = q/p, γ = 1 - β."""
    near = is_near(u)
    below = tl.where(near, u + phi_near(u, ACC), ratio - 1.0)
    of_p = log1p(gamma * below, beta + gamma * ratio, ACC)
    # p/q - 1; beyond e^16, where it may be no number, the difference of the logarithms is none of near numbers
    above = -beta * below / tl.where(u < -16.0, 1.0, tl.where(near, 1.0 + below, ratio))
    return of_p, tl.where(u < -16.0, of_p - u, log1p(above, 1.0 + above, ACC))


@triton.jit
def by_size(p, q, u, beta, gamma) -> tuple[tl.tensor, ...]:
    """(p is the larger, log of the smaller over the larger, their ratio, what each is multiplied by in M)."""
    falls = u <= 0.0
    large, small = tl.where(falls, p, q), tl.where(falls, q, p)
    ratio = small / tl.where(large == 0.0, 1.0, large)
    return falls, -tl.abs(u), ratio, tl.where(falls, beta, gamma), tl.where(falls, gamma, beta)


@triton.jit
def mixed(p, q, u, beta, gamma, ACC: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """What a class adds to KL(p‖M) and to KL(q‖M), M = β p + γ q, u = log(q/p), γ = 1 - β."""
    falls, x, ratio, b, g = by_size(p, q, u, beta, gamma)
    large, small = tl.where(falls, p, q), tl.where(falls, q, p)
    of_large, of_small = mixed_logs(x, ratio, b, g, ACC)
    far_large = g * (small - large) - product_or_0(large, of_large)
    far_small = b * (large - small) - product_or_0(small, of_small)
    in_large = tl.where(is_near(of_large), product_or_0(large, phi_near(of_large, ACC)), far_large)
    in_small = tl.where(is_near(of_small), product_or_0(small, phi_near(of_small, ACC)), far_small)
    return tl.where(falls, in_large, in_small), tl.where(falls, in_small, in_large)

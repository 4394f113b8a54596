"""A standard call of each public function, for `hw3gpu info --explain`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

import hw3gpu
import hw3gpu.functional as HF


class Call(NamedTuple):
    """`function(*args, **kwargs)`."""

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012


class _LanguageModel(torch.nn.Module):
    """The least that `patch_transformers` takes for a model: a head, named, and a forward that has labels and calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = torch.nn.Linear(2, 3)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.lm_head

    def forward(self, states: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return self.lm_head(states)


def standard_calls(
    images: tuple[int, int, int, int] = (32, 64, 28, 28), logits: tuple[int, int] = (256, 1000), m: int = 64
) -> list[Call]:
    """A call of each public function of `hw3gpu`, on NumPy arrays, and of `hw3gpu.functional`, on tensors of the host.

    images: (N, C, H, W) of batch normalisation; logits: (rows, classes); m: variables of a covariance, at most the classes.
    """
    rng, (R, V), k = np.random.default_rng(0), logits, max(m // 8, 1)
    x, dy = (rng.standard_normal(images, np.float32) for _ in range(2))
    z, a = rng.standard_normal(logits, np.float32), rng.standard_normal((m, m))
    gamma, p, classes = np.ones(images[1], np.float32), np.full(logits, 1 / V, np.float32), rng.integers(0, V, R)
    sigma = a @ a.T / m
    tx, tz, target = torch.from_numpy(x), torch.from_numpy(z), torch.from_numpy(classes)
    rows, W, tsigma = torch.from_numpy(z[:, :m].copy()), torch.randn(V, m), torch.from_numpy(sigma)
    training = {"training": True, "residual": torch.from_numpy(dy), "activation": "relu"}
    return [
        Call(hw3gpu.batch_norm, (x, gamma, gamma)),
        Call(hw3gpu.batch_norm_backward, (dy, x, gamma, gamma, gamma)),
        Call(hw3gpu.conv2d_output_shape, ((32, 28, 28, 64), 128, (3, 3))),
        Call(hw3gpu.conv2d_padding_for, (28, 28, 3)),
        Call(hw3gpu.conv_transpose2d_output_shape, ((32, 28, 28, 64), 128, (3, 3))),
        Call(hw3gpu.cross_entropy, (p, p)),
        Call(hw3gpu.empty_cache),
        Call(hw3gpu.explain, (hw3gpu.softmax, z)),
        Call(hw3gpu.minimize_trace, (sigma, k)),
        Call(hw3gpu.minor_components, (z[:, :m], k)),
        Call(hw3gpu.moments, (z[:, :m],)),
        Call(hw3gpu.patch_transformers, (_LanguageModel(),)),
        Call(hw3gpu.points_with_moments, (np.zeros(m), sigma)),
        Call(hw3gpu.softmax, (z,)),
        Call(hw3gpu.softmax_backward, (z, p)),
        Call(hw3gpu.softmax_cross_entropy, (z, classes)),
        Call(hw3gpu.softmax_jacobian, (z[0, :m],)),
        Call(hw3gpu.use_backend, ("auto",)),
        Call(HF.batch_norm, (tx, None, None), training),
        Call(HF.check_targets),
        Call(HF.cross_entropy, (tz, target)),
        Call(HF.distillation_loss, (tz, tz.flip(0).contiguous())),
        Call(HF.linear_cross_entropy, (rows, W, target)),
        Call(HF.linear_distillation_loss, (rows, W, rows, W)),
        Call(HF.linear_token_log_probs, (rows, W, target)),
        Call(HF.minimize_trace, (tsigma, k)),
        Call(HF.softmax, (tz, 1)),
        Call(HF.token_log_probs, (tz, target)),
    ]

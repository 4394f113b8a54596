"""Options of the wrong kind: a TypeError that names the argument, of every public function and every option."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import hw3gpu
import hw3gpu.functional as HF
from hw3gpu import distributed

X, CLASSES, SQUARE = np.linspace(0.0, 1.0, 18).reshape(6, 3), torch.arange(6) % 3, np.eye(3)
T, ONES = torch.tensor(X), torch.ones(3, dtype=torch.float64)
LOSS = ("weight", "ignore_index", "reduction", "label_smoothing", "z_loss", "softcap")
CALLS = {
    "batch_norm": (lambda **o: hw3gpu.batch_norm(X, **o), ("eps", "channel_axis")),
    "batch_norm_backward": (lambda **o: hw3gpu.batch_norm_backward(X, X, SQUARE[0], SQUARE[0], **o), ("eps", "channel_axis")),
    "softmax": (lambda **o: hw3gpu.softmax(X, **o), ("axis",)),
    "softmax_backward": (lambda **o: hw3gpu.softmax_backward(X, X, **o), ("axis",)),
    "moments": (lambda **o: hw3gpu.moments(X, **o), ("ddof",)),
    "points_with_moments": (lambda **o: hw3gpu.points_with_moments(X[0], SQUARE, **o), ("n", "ddof", "rng")),
    "minimize_trace": (
        lambda **o: hw3gpu.minimize_trace(SQUARE, **{"k": 1, **o}), ("k", "largest", "dtype", "method", "certify"),
    ),
    "minor_components": (lambda **o: hw3gpu.minor_components(X, **{"k": 1, **o}), ("k", "largest", "ddof")),
    "MomentAccumulator": (hw3gpu.MomentAccumulator, ("m",)),
    "functional.batch_norm": (
        lambda **o: HF.batch_norm(T, None, None, **{"training": True, **o}),
        ("weight", "training", "momentum", "eps", "residual", "activation"),
    ),
    "functional.softmax": (lambda **o: HF.softmax(T, **{"dim": 1, **o}), ("dim", "dtype")),
    "functional.cross_entropy": (lambda **o: HF.cross_entropy(T, CLASSES, **o), (*LOSS, "gradient", "all_ignored")),
    "functional.linear_cross_entropy": (
        lambda **o: HF.linear_cross_entropy(T, T[:3], CLASSES, **o),
        (*LOSS, "gradient", "all_ignored", "linear_bias", "chunk_rows"),
    ),
    "functional.minimize_trace": (
        lambda **o: HF.minimize_trace(torch.eye(3), **{"k": 1, **o}), ("k", "largest", "method"),
    ),
    "distributed.sync_batch_norm": (
        lambda **o: distributed.sync_batch_norm(T, None, None, **o), ("group",),
    ),
    "distributed.vocab_parallel_cross_entropy": (
        lambda **o: distributed.vocab_parallel_cross_entropy(T, CLASSES, **o), (*LOSS, "vocab_start", "group"),
    ),
    "distributed.vocab_parallel_linear_cross_entropy": (
        lambda **o: distributed.vocab_parallel_linear_cross_entropy(T, T[:3], CLASSES, **o),
        (*LOSS, "gradient", "all_ignored", "linear_bias", "chunk_rows", "return_stats", "vocab_start", "group", "logit_scale",
         "loss_dtype", "normalizer", "token_weight"),
    ),
    "distributed.vocab_parallel_token_log_probs": (
        lambda **o: distributed.vocab_parallel_token_log_probs(T, CLASSES, **o),
        ("temperature", "ignore_index", "vocab_start", "group"),
    ),
    "distributed.vocab_parallel_linear_token_log_probs": (
        lambda **o: distributed.vocab_parallel_linear_token_log_probs(T, T[:3], CLASSES, **o),
        ("temperature", "ignore_index", "linear_bias", "chunk_rows", "vocab_start", "group"),
    ),
}  # fmt: skip
NAMES = ("reduction", "gradient", "all_ignored", "activation", "method")


@pytest.mark.parametrize(("name", "option"), [(name, option) for name, (_, options) in CALLS.items() for option in options])
def test_an_option_of_the_wrong_kind_is_a_type_error_that_names_it(name, option):
    wrong = (1 + 2j, object(), np.array([1.5, 2.5]), {"a": 1}, b"x", math)
    for value in wrong if option in (*NAMES, "dtype") else (*wrong, "x"):
        with pytest.raises(TypeError, match=rf"^{option}: ") as caught:
            CALLS[name][0](**{option: value})
        assert "truth value" not in str(caught.value)


def test_a_function_over_processes_says_that_there_are_none():
    calls = CALLS["distributed.vocab_parallel_cross_entropy"][0], CALLS["distributed.vocab_parallel_linear_cross_entropy"][0]
    for call in (*calls, CALLS["distributed.sync_batch_norm"][0]):
        with pytest.raises(RuntimeError, match=r"^group: expected a process group, or torch.distributed.init_process_group"):
            call()


def test_a_target_of_divided_classes_that_is_no_tensor():
    for call in (distributed.vocab_parallel_cross_entropy, distributed.vocab_parallel_token_log_probs):
        with pytest.raises(TypeError, match=r"^target: expected a torch.Tensor, got builtins.list"):
            call(T, [0, 1, 2, 0, 1, 2])


def test_a_module_refuses_an_activation_of_the_wrong_kind():
    from hw3gpu import nn

    with pytest.raises(TypeError, match=r"^activation: expected one of relu, silu, hardswish, gelu, got 1"):
        nn.BatchNormAct2d(3, activation=1)
    with pytest.raises(TypeError, match=r"^momentum: expected a number, got 'x'"):
        nn.BatchNorm1d(3, momentum="x")(T.float())

"""Whatever the arguments are: a result of the documented shape, or an error that names the argument (`spoilt_arguments.py`)."""

from __future__ import annotations

import numpy as np
import pytest
import spoilt_arguments
import torch

import hw3gpu
import hw3gpu.functional as HF
from hw3gpu import nn

T, CLASSES = torch.linspace(0, 1, 6).reshape(2, 3), torch.tensor([0, 2])


@pytest.mark.parametrize("inputs", [600, pytest.param(40_000, marks=pytest.mark.slow)])
def test_any_input_ends_in_a_result_or_in_an_error_that_names_an_argument(inputs):
    ends, wrong = spoilt_arguments.run(seed=20240229, inputs=inputs)
    assert not wrong, "\n".join(wrong)
    assert sum(ends.values()) == inputs
    assert ends["result"] > inputs / 10
    assert ends["TypeError"] > inputs / 10


class Two:
    def __index__(self):
        return 2


class NoIndex:
    def __index__(self):
        raise KeyError


def test_what_the_generator_calls_wrong(monkeypatch):
    """No name in a message, another shape, an argument written, another exception, a flood of warnings."""
    import random
    import warnings

    def forgets(x):
        raise ValueError("too large")

    def writes(x):
        x += 1
        return x

    def floods(x):
        for i in range(5):
            warnings.warn(str(i), stacklevel=1)
        return x

    calls = {
        "no argument is named": forgets, "another shape": lambda x: x[:1], "was written": writes,
        "ZeroDivisionError": lambda x: 1 / 0, "5 warnings": floods,
    }  # fmt: skip
    for text, call in calls.items():
        of = spoilt_arguments.Function(call, lambda rng: {"x": np.ones(3)}, lambda g, y: y.shape == (3,))
        monkeypatch.setattr(spoilt_arguments, "arguments", lambda rng, of, pool: of.good(rng))
        assert text in spoilt_arguments.run_one(0, random.randrange(9), {"f": of}, [])[2]


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "^ignore_index: expected an integer of 64 bits", lambda: HF.cross_entropy(T, CLASSES, ignore_index=2**63)),
        (TypeError, "^ignore_index: expected an integer", lambda: HF.cross_entropy(T, T, ignore_index="x")),
        (TypeError, "^ignore_index: ", lambda: HF.cross_entropy(T, CLASSES, ignore_index=torch.tensor(1, device="meta"))),
        (TypeError, "^k: expected an integer", lambda: hw3gpu.minimize_trace(np.eye(2), NoIndex())),
        (ValueError, "^n: expected an integer of 64", lambda: hw3gpu.points_with_moments(np.ones(2), np.eye(2), 2**64)),
        (ValueError, "^eps: expected a number that a float holds", lambda: hw3gpu.batch_norm(T.numpy(), eps=10**400)),
        (ValueError, "^z_loss: expected a number that a float", lambda: HF.cross_entropy(T, CLASSES, z_loss=10**400)),
        (TypeError, "^return_stats: expected a bool", lambda: HF.cross_entropy(T, CLASSES, return_stats=np.ones(2))),
        (TypeError, "^return_dx_hat: ", lambda: hw3gpu.batch_norm_backward(T, T, T[0], T[0], return_dx_hat=[])),
        (TypeError, "^input: expected a torch.Tensor", lambda: HF.batch_norm([1.0], None, None, training=True, residual=T)),
        (TypeError, "^input: expected a torch.Tensor", lambda: HF.batch_norm(2, None, None, training=True, activation="relu")),
        (TypeError, "^activation: expected one of relu",
         lambda: HF.batch_norm(T, None, None, training=True, activation=np.ones(2))),
        (TypeError, "^input: expected a torch.Tensor", lambda: nn.BatchNorm2d(3)([1, 2])),
        (TypeError, "^input: expected a torch.Tensor", lambda: nn.BatchNormAct2d(3)(np.ones((2, 3, 1, 1)))),
        (TypeError, "^momentum: expected a number", lambda: nn.BatchNorm1d(3, momentum=[])(T)),
        (TypeError, "^momentum: expected a number", lambda: nn.BatchNorm1d(3, momentum=np.ones(2))(T)),
        (TypeError, "^running_mean: expected a dense tensor",
         lambda: HF.batch_norm(T, torch.nested.nested_tensor([T[0]]), T[0], training=True)),
        (RuntimeError, "^running_var: expected a number of its own for each channel",
         lambda: HF.batch_norm(T, T[0].clone(), torch.ones(1).expand(3), training=True)),
        (TypeError, "^covariance: expected a dense tensor",
         lambda: HF.minimize_trace(torch.nested.nested_tensor([T]), 1)),
        (ValueError, "^points: expected at most 32 axes", lambda: hw3gpu.minor_components(np.ones([1] * 60 + [3, 2]), 1)),
        (ValueError, "^z: expected at most 60 axes", lambda: hw3gpu.softmax_jacobian(torch.ones([1] * 62 + [3, 2]))),
        (TypeError, "^channel_axis: expected an integer", lambda: hw3gpu.batch_norm(T, channel_axis=torch.tensor(True))),
        (ValueError, "^linear_weight: expected at least one class", lambda: HF.linear_token_log_probs(T, T[:0], CLASSES)),
        (IndexError, "^target: expected classes in 0…2 or ignore_index -100, got 7 in row 1",
         lambda: HF.cross_entropy(T, torch.tensor([0, 7]), return_stats=True, differentiable=True, softcap=3.0)),
        (IndexError, "^target: expected classes in 0…1 or ignore_index -100, got 7 in row 1",
         lambda: HF.linear_cross_entropy(T, T, torch.tensor([0, 7]), return_stats=True, differentiable=True, softcap=3.0)),
        (TypeError, "^kernel_size must be an integer or a pair",
         lambda: hw3gpu.conv2d_output_shape((1, 4, 4, 1), 1, torch.tensor(1.5))),
        (TypeError, "^input_shape must be", lambda: hw3gpu.conv2d_output_shape(np.array(3), 1, 1)),
        (TypeError, "^use_backend: expected one of", lambda: hw3gpu.use_backend(np.ones(2)).__enter__()),
        (TypeError, "^device: expected None", lambda: HF.check_targets(np.ones(2))),
        (ValueError, "^device: expected a CUDA device", lambda: HF.check_targets("nowhere")),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_inputs_that_ended_otherwise_once(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_whatever_has_an_index_is_an_integer():
    target = torch.tensor([0, 2])
    x = T.clone().requires_grad_()
    for value in (Two(), np.int64(2), torch.tensor(2)):
        expected = HF.cross_entropy(x, target, ignore_index=2)
        assert torch.equal(HF.cross_entropy(x, target, ignore_index=value), expected)
        assert torch.equal(HF.linear_cross_entropy(x, T, target % 2, ignore_index=value, chunk_rows=value),
                           HF.linear_cross_entropy(x, T, target % 2, ignore_index=2, chunk_rows=2))  # fmt: skip
        for ours, plain in zip(HF.token_log_probs(x, target, ignore_index=value, dim=-1),
                               HF.token_log_probs(x, target, ignore_index=2), strict=True):  # fmt: skip
            assert torch.equal(ours, plain)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_classes_of_few_bits_are_the_classes_they_are(dtype):
    """PyTorch takes `uint8 == -100` for `uint8 == 156`, and an index of uint8 for a mask."""
    target = torch.tensor([156 if dtype != torch.int8 else 100, 5])
    few, z, weight = target.to(dtype), torch.linspace(0, 1, 1024).reshape(2, 512), torch.linspace(0.5, 1, 512)
    z[0, int(target[0])] = 9.0
    for options in ({}, {"differentiable": True}, {"differentiable": True, "softcap": 3.0}):
        ours, plain = (HF.cross_entropy(z, t, weight, return_stats=True, **options) for t in (few, target))
        assert torch.equal(ours[0], plain[0])
        assert ours[1].correct.tolist() == plain[1].correct.tolist() == [True, False]
        assert torch.equal(ours[1].log_prob, plain[1].log_prob)
    for function in (lambda z, t: HF.token_log_probs(z, t).log_prob, lambda z, t: HF.cross_entropy(z, t, weight)):
        ours, plain = (torch.vmap(function, in_dims=(0, None))(z[None], t) for t in (few, target))
        assert torch.equal(ours, plain)
        assert (plain != 0).all()
    import torch.distributed as dist

    from hw3gpu.distributed import vocab_parallel_cross_entropy

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert torch.equal(*(vocab_parallel_cross_entropy(z, t, reduction="none") for t in (few, target)))
    finally:
        dist.destroy_process_group()

"""The products of linear cross entropy on a GPU, counted on meta tensors: how many, how aligned, and the memory beside them."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch

import hw3gpu.functional as HF
from benchmarks import products
from hw3gpu._torch import linear_chunks

PAGE = Path(__file__).parent.parent / "docs" / "gpu.md"


def leaves(*shapes, dtype=torch.bfloat16):
    return [torch.empty(shape, dtype=dtype, device="meta", requires_grad=True) for shape in shapes]


@pytest.fixture(scope="module")
def lines():
    return {model: products.line(model) for model in products.MODELS}


@pytest.mark.parametrize("model", products.MODELS, ids=lambda model: model.name)
def test_a_chunk_is_three_products_in_whole_tiles(lines, model):
    book = products.step(model)
    logits, dx, dW = book.products[::3], book.products[1::3], book.products[2::3]
    assert {(p.k, p.n) for p in logits} == {(model.D, model.V)}
    assert {(p.k, p.n) for p in dx} == {(model.V, model.D)}
    assert {(p.m, p.n) for p in dW} == {(model.V, model.D)}
    rows = [p.m for p in logits]
    assert sum(rows) == products.ROWS
    assert rows == [p.m for p in dx] == [p.k for p in dW]
    assert not any(n % linear_chunks.TILE for n in rows)
    assert len(set(rows[:-1])) <= 1
    assert min(p.alignment for p in book.products) >= 2 * linear_chunks.TILE  # bytes, of every matrix and every row
    # ∂ℓ/∂W is rounded once and scaled once, and no chunk passes over it outside of its product
    of_x, of_W = 2 * products.ROWS * model.D, 2 * model.V * model.D
    assert book.elementwise_bytes <= 1.001 * (5 * of_W + 2 * of_x)
    assert lines[model].rest <= 0.1


def test_the_page_has_the_table(lines):
    """Also the times that it calls predictions."""
    with mock.patch.object(products, "line", side_effect=lines.get):
        assert "\n".join(products.table()) in PAGE.read_text()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_what_cannot_add_to_float32_takes_slices_of_whole_tiles(dtype):
    """A step in float16, whose ∂ℓ/∂W is multiplied by a power of two; and PyTorch for ROCm."""
    x, W = leaves((4096, 512), (50257, 512), dtype=dtype)
    with mock.patch.object(torch.version, "hip", None if dtype == torch.float16 else "7.0"), products.counted() as book:
        HF.linear_cross_entropy(x, W, torch.empty(4096, dtype=torch.int64, device="meta")).backward()
    slices = [p for p in book.products if p.n == 512 and p.k != 50257]
    assert sum(p.m for p in slices) == 50257 * sum(p.n == 50257 for p in book.products)
    assert min(p.alignment for p in book.products) >= 2 * linear_chunks.TILE


def test_as_many_products_of_the_other_losses():
    """Four of all rows for token log-probabilities, six for distillation where the teacher has no gradients."""
    target = torch.empty(4096, dtype=torch.int64, device="meta")
    x, W, teacher, head = leaves((4096, 1024), (32000, 1024), (4096, 2048), (32000, 2048))
    with products.counted() as book:
        HF.linear_token_log_probs(x, W, target).log_prob.sum().backward()
    forward = [p for p in book.products[: -(-4096 // book.products[0].m)]]
    backward = book.products[len(forward) :]
    assert sum(p.m for p in forward) == sum(p.m for p in backward[::3]) == 4096
    assert len(backward) == 3 * (4096 // backward[0].m)
    assert backward[0].m == 512  # logits and dz share as many numbers as W has
    with products.counted() as book:
        HF.linear_distillation_loss(x, W, teacher.detach(), head.detach()).backward()
    assert sum(2 * p.m * p.k * p.n for p in book.products) == 2 * 4096 * 32000 * (4 * 1024 + 2 * 2048)
    assert min(p.alignment for p in book.products) >= 2 * linear_chunks.TILE


def test_evaluation_keeps_to_a_tenth_of_the_logits():
    """Without gradients there is no float32 ∂ℓ/∂W beside which a chunk could be larger."""
    x, W = (v.detach() for v in leaves((4096, 4096), (32000, 4096)))
    with products.counted() as book:
        HF.linear_cross_entropy(x, W, torch.empty(4096, dtype=torch.int64, device="meta"))
    assert book.peak <= 0.1 * 2 * 4096 * 32000

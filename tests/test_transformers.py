"""`hw3gpu.patch_transformers` on small random models of Hugging Face's, loss and gradients against the unpatched ones."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F

import hw3gpu
from hw3gpu import functional
from hw3gpu._nn.lazy_logits import LazyHead, LazyLogits

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install hw3gpu[transformers]")

CAP, UNIT = 1.5, 2.0**-8  # bfloat16 rounds by at most that part of a number
SIZES = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"vocab_size": 97, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 2}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FAMILIES = {
    "Llama": ("LlamaForCausalLM", SIZES),
    "Llama, tied": ("LlamaForCausalLM", SIZES | {"tie_word_embeddings": True}),
    "Qwen2": ("Qwen2ForCausalLM", SIZES),
    "Qwen3": ("Qwen3ForCausalLM", SIZES),
    "Gemma": ("GemmaForCausalLM", SIZES),
    "Gemma2, its softcap": ("Gemma2ForCausalLM", SIZES | {"final_logit_softcapping": CAP}),
    "GPT-2": ("GPT2LMHeadModel", GPT2),
    "Cohere, its scale": ("CohereForCausalLM", SIZES | {"logit_scale": 0.3}),
    "Granite, its divisor": ("GraniteForCausalLM", SIZES | {"logits_scaling": 3.0}),
}


def model_of(family, dtype=torch.float64, **more):
    name, sizes = FAMILIES[family]
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    return kind(kind.config_class(**sizes, **more)).to(dtype)


def batch():
    torch.manual_seed(1)
    tokens = torch.randint(3, 97, (2, 9))
    labels = tokens.clone()
    labels[0, :4] = -100
    return {"input_ids": tokens, "labels": labels}


def step(model, **more):
    """The loss, and the gradients of all parameters."""
    loss = model(**batch(), **more).loss
    model.zero_grad()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def hold(found, exact):
    """To the roundings of a float32 gradient of the logits, which the unpatched model has."""
    assert float((found.double() - exact.double()).abs().max()) <= 1e-6 * float(exact.abs().max())


@pytest.fixture
def fused(monkeypatch):
    """The shapes of the hidden states that came to the fused loss."""
    shapes, whole = [], functional.linear_cross_entropy
    monkeypatch.setattr(
        functional, "linear_cross_entropy", lambda x, *args, **options: shapes.append(x.shape) or whole(x, *args, **options)
    )
    return shapes


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_unpatched_model(family, fused):
    model = model_of(family)
    expected, state = step(model), list(model.state_dict())
    with hw3gpu.patch_transformers(model) as patch:
        assert patch.fused == ["lm_head"]
        for found, exact in zip(step(model), expected, strict=True):
            hold(found, exact)
        assert fused == [(18, 16)]
        assert list(model.state_dict()) == state
    assert type(model.lm_head) is torch.nn.Linear
    for found, exact in zip(step(model), expected, strict=True):
        assert torch.equal(found, exact)
    assert len(fused) == 1


@pytest.mark.parametrize("count", [7, torch.tensor(23)])
def test_the_number_of_items_is_honoured(count, fused):
    model = model_of("Llama")
    expected = step(model, num_items_in_batch=count)
    hw3gpu.patch_transformers(model)
    for found, exact in zip(step(model, num_items_in_batch=count), expected, strict=True):
        hold(found, exact)
    assert fused


def of_the_head(model, autocast):
    """(loss, hidden states that have a label, their gradient, that of the head's weight, labels), the others' gradient is 0."""
    seen = []
    model.model.register_forward_hook(lambda module, given, found: seen.append(found.last_hidden_state))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**batch()).loss
    dh, dW = torch.autograd.grad(loss, (seen[0], model.lm_head.weight))
    labels = F.pad(batch()["labels"][:, 1:], (0, 1), value=-100)
    assert not dh[labels == -100].any()
    labelled = labels != -100
    return loss.detach(), seen[0].detach()[labelled], dh[labelled], dW, labels[labelled]


def exact_and_bounds(h, W, labels):
    """(loss, its gradients by h and W) of the numbers that a product of bfloat16 takes, and for each a bound of what rounding
    may do to it, of first order: to a logit z, to its gradient dz, and to the results."""
    h, W = h.bfloat16().double(), W.detach().bfloat16().double()
    z = h @ W.t()
    capped = CAP * (z / CAP).tanh()
    slope, p, n = 1 - (capped / CAP).square(), capped.softmax(-1), len(labels)
    away = p - F.one_hot(labels, W.shape[0])
    dz, moved = away * slope / n, slope * UNIT * z.abs()  # moved: what a rounded logit does to a capped one
    of_p = p * (moved + (p * moved).sum(-1, keepdim=True))
    of_dz = (of_p * slope + away.abs() * 2 * capped.abs() / CAP**2 * moved) / n + UNIT * dz.abs()
    exact = F.cross_entropy(capped, labels), dz @ W, dz.t() @ h
    of_loss = (away.abs() * moved).sum() / n
    return exact, (of_loss, of_dz @ W.abs() + UNIT * exact[1].abs(), of_dz.t() @ h.abs() + UNIT * exact[2].abs())


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.bfloat16, False), (torch.float32, True)])
def test_half_precision_and_autocast(fused, dtype, autocast):
    """What the head gives and takes, within the roundings of logits, dz and results.

    The layers below are the model's own: their gradients go through some eight roundings more, of 2^-8 each, which fall
    otherwise in a patched model than in an unpatched one, so that neither bounds the other.
    """
    model = model_of("Gemma2, its softcap", dtype, tie_word_embeddings=False)
    model.lm_head.weight.data *= 32  # to logits that the cap changes
    hw3gpu.patch_transformers(model)
    loss, h, *gradients, labels = of_the_head(model, autocast)
    assert loss.dtype == torch.float32
    assert fused == [(18, 16)]
    for found, exact, bound in zip((loss, *gradients), *exact_and_bounds(h, model.lm_head.weight, labels), strict=True):
        assert ((found.double() - exact).abs() <= (1 + 8 * UNIT) * bound).all()


def test_logits_are_there_for_whoever_asks():
    model = model_of("Gemma2, its softcap").eval()
    expected = model(**batch()).logits
    weight = torch.randn_like(expected)
    grads = [torch.autograd.grad((expected * weight).sum(), model.lm_head.weight)[0]]
    hw3gpu.patch_transformers(model)
    logits = model(**batch()).logits
    assert type(logits) is LazyLogits
    assert isinstance(logits, torch.Tensor)
    assert (logits.shape, logits.dtype, len(logits), logits.dim()) == ((2, 9, 97), torch.float64, 2, 3)
    assert logits.to("cpu") is logits
    assert logits.contiguous() is logits
    assert type(logits.to(torch.bfloat16)) is LazyLogits
    assert logits.computed is None
    grads.append(torch.autograd.grad((logits * weight).sum(), model.lm_head.weight)[0])
    assert torch.equal(*grads)
    torch.testing.assert_close(logits[:, -1], expected[:, -1], rtol=1e-12, atol=1e-14)
    for use in (
        lambda z: z.argmax(-1), lambda z: z.detach().numpy().tolist(), lambda z: torch.cat([z, z]), repr, lambda z: z.to("cpu"),
        lambda z: z.log_softmax(-1), lambda z: z[..., 5], lambda z: z[:, 1:, :], lambda z: z.view(-1, 97), lambda z: z.tanh(),
        lambda z: z.requires_grad, lambda z: 2 - z, lambda z: z * -1.0, lambda z: z.float().half(), lambda z: z.reshape(2, -1),
        lambda z: F.cross_entropy(z.movedim(-1, 1), torch.zeros(2, 9, dtype=torch.int64)).half(), lambda z: z.sum().item(),
    ):  # fmt: skip
        with torch.no_grad():
            ours, theirs = use(model(**batch()).logits), use(expected.detach())
        ours = ours.compute() if isinstance(ours, LazyLogits) else ours
        if isinstance(ours, torch.Tensor):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
        else:
            assert ours == theirs
    with torch.no_grad():
        assert model.generate(batch()["input_ids"], max_new_tokens=3, do_sample=False).shape == (2, 12)


def test_what_passes_python_by_keeps_its_graph():
    """An autograd function takes the tensor without asking it."""

    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 0.5

        @staticmethod
        def backward(ctx, g):
            return g * 0.25

    model, found = model_of("Gemma2, its softcap"), []
    for patched in (False, True):
        if patched:
            hw3gpu.patch_transformers(model)
        logits = model(**batch()).logits
        assert logits.requires_grad
        loss = Half.apply(logits).square().sum()
        found.append([loss.detach(), torch.autograd.grad(loss, model.lm_head.weight)[0]])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_it_is_found_in_a_wrapper_and_survives_copies():
    class Wrapper(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = torch.nn.ModuleList([model])

        def forward(self, **given):
            return self.inner[0].forward(**given)

    wrapper = Wrapper(model_of("GPT-2"))
    expected = step(wrapper)
    patch = hw3gpu.patch_transformers(wrapper)
    assert patch.fused == ["inner.0.lm_head"]
    for other in (wrapper, copy.deepcopy(wrapper), pickle.loads(pickle.dumps(wrapper.inner[0]))):
        assert any(isinstance(m, LazyHead) for m in other.modules())
        for found, exact in zip(step(other), expected, strict=True):
            hold(found, exact)


def test_a_head_that_is_no_plain_linear_keeps_its_product(fused, monkeypatch):
    class Adapted(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.low = base, torch.nn.Linear(16, 97, bias=False, dtype=torch.float64)

        def forward(self, x):
            return self.base(x) + self.low(x)

    model = model_of("Qwen2")
    model.set_output_embeddings(Adapted(model.lm_head))
    expected, calls = step(model), []
    whole = functional.cross_entropy
    monkeypatch.setattr(functional, "cross_entropy", lambda *args, **options: calls.append(1) or whole(*args, **options))
    with hw3gpu.patch_transformers(model) as patch:
        assert (patch.fused, patch.unfused) == ([], ["lm_head"])
        for found, exact in zip(step(model), expected, strict=True):
            hold(found, exact)
    assert calls == [1]
    assert not fused
    assert not model.lm_head._forward_hooks


def test_it_trains_and_says_what_it_did(caplog):
    losses = []
    for patched in (False, True):
        model = model_of("Llama", torch.float32)
        if patched:
            with caplog.at_level(logging.INFO, "hw3gpu"):
                hw3gpu.patch_transformers(model)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for _ in range(5):
            loss = model(**batch()).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert "patch_transformers: lm_head, Linear: its product is part of the cross entropy" in caplog.text


def test_a_compiled_model_is_as_unpatched():
    model = model_of("Llama")
    expected = step(model)[0]
    hw3gpu.patch_transformers(model)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(**batch()).loss.double(), expected.double(), rtol=1e-6, atol=0)


def test_bad_input():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got builtins.str"):
        hw3gpu.patch_transformers("gpt2")
    with pytest.raises(ValueError, match="model: expected a model whose forward takes labels and calls its output embeddings"):
        hw3gpu.patch_transformers(torch.nn.Linear(2, 3))
    model = model_of("Llama")
    patch = hw3gpu.patch_transformers(model)
    with pytest.raises(ValueError, match="model: lm_head is patched already"):
        hw3gpu.patch_transformers(model)
    patch.remove()
    patch.remove()
    hw3gpu.patch_transformers(model)

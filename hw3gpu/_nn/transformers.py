"""Hugging Face models with this library's cross entropy, and with their head fused to it."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from types import TracebackType

import torch
from torch.utils.hooks import RemovableHandle

from .lazy_logits import LazyHead, wrapped

__all__ = ["TransformersPatch", "patch_transformers"]

_LOG = logging.getLogger("hw3gpu")


class TransformersPatch:
    """What `patch_transformers` has replaced; as a context manager it is removed at the end.

    Attributes:
        fused: the names of the heads whose product is part of their loss.
        unfused: the names of the heads that compute their logits, whose cross entropy is this library's.
    """

    def __init__(self) -> None:
        self.fused: list[str] = []
        self.unfused: list[str] = []
        self._heads: list[torch.nn.Module] = []
        self._hooks: list[RemovableHandle] = []

    def remove(self) -> None:
        """The model as it was."""
        for head in self._heads:
            head.__class__ = torch.nn.Linear
        for hook in self._hooks:
            hook.remove()
        self._heads, self._hooks = [], []

    def __enter__(self) -> TransformersPatch:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()


def patch_transformers(model: torch.nn.Module) -> TransformersPatch:
    """Replaces the cross entropy of Hugging Face language models in `model`, and fuses their head with it.

    A model is one whose `forward` takes `labels` and calls the module that `get_output_embeddings()` names, its head: Llama,
    Qwen, Gemma, GPT-2 and similar models, also inside of a wrapper. The model's own code still runs. A head that is a
    `torch.nn.Linear` returns logits that are not computed. Scales, a cap, a change of dtype and a view of the rows are
    recorded, and `torch.nn.functional.cross_entropy` of them is `hw3gpu.functional.linear_cross_entropy`, which never holds
    more than a chunk. Any other use, such as `outputs.logits` after the loss, computes the logits then. So the model's shift of
    labels, `ignore_index` and `num_items_in_batch` work as before. Any other head (of an adapter, quantised, with hooks)
    computes its logits, and their cross entropy is `hw3gpu.functional.cross_entropy`.

    What it replaced is logged at level INFO by the logger "hw3gpu". `remove()` of the result undoes it. Under `torch.compile`,
    `torch.export` and `torch.func` a patched model computes as an unpatched one. `resize_token_embeddings` makes a new head:
    call it before.

    Raises TypeError unless model is a `torch.nn.Module`, ValueError where it has no such head, or one that is patched already.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__module__}.{type(model).__qualname__}")
    heads = dict(_heads(model))
    if not heads:
        raise ValueError(
            f"model: expected a model whose forward takes labels and calls its output embeddings, got {type(model).__name__}"
        )
    for name, head in heads.items():
        if isinstance(head, LazyHead) or wrapped in head._forward_hooks.values():
            raise ValueError(f"model: {name} is patched already")
    patch = TransformersPatch()
    for name, head in heads.items():
        kind = type(head).__name__
        replaced = type(head) is torch.nn.Linear and "forward" not in vars(head) and not head._forward_hooks
        if replaced:
            head.__class__ = LazyHead
            patch._heads.append(head)
            patch.fused.append(name)
        else:
            patch._hooks.append(head.register_forward_hook(wrapped))
            patch.unfused.append(name)
        what = "its product is part of the cross entropy" if replaced else "the cross entropy of what it computes"
        _LOG.info("patch_transformers: %s, %s: %s", name, kind, what)
    return patch


def _heads(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """(name, head) of every model in `model` whose forward takes labels and calls the head, each head once."""
    names = {id(module): name for name, module in model.named_modules()}
    seen = set()
    for name, module in model.named_modules():
        forward, embeddings = inspect.unwrap(type(module).forward), getattr(module, "get_output_embeddings", None)
        if embeddings is None or "labels" not in inspect.signature(forward).parameters:
            continue
        head = embeddings()
        path = names.get(id(head), "")
        below = path.removeprefix(f"{name}." if name else "")
        called = getattr(forward, "__code__", None) is not None and below.partition(".")[0] in forward.__code__.co_names
        if isinstance(head, torch.nn.Module) and called and id(head) not in seen:
            seen.add(id(head))
            yield path, head

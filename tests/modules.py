"""Our modules and PyTorch's, alike, for the tests of `hw3gpu.nn`."""

from __future__ import annotations

import torch
from torch import nn

import hw3gpu.nn as HN

PAIRS = {
    "1d": (HN.BatchNorm1d, nn.BatchNorm1d, (6, 3)),
    "1d, with a length": (HN.BatchNorm1d, nn.BatchNorm1d, (4, 3, 5)),
    "2d": (HN.BatchNorm2d, nn.BatchNorm2d, (2, 3, 5, 5)),
    "3d": (HN.BatchNorm3d, nn.BatchNorm3d, (2, 3, 2, 3, 2)),
}


def twins(name, device, **options):
    """Our module and PyTorch's, with the same parameters, and the shape of an input."""
    ours, theirs, shape = PAIRS[name]
    options = {"device": device, "dtype": torch.float64} | options
    theirs = theirs(shape[1], **options)
    if theirs.weight is not None:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in theirs.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
    ours = ours(shape[1], **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, shape


def batch(shape, device, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def same_state(ours, theirs):
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        same(ours.state_dict()[name], value)

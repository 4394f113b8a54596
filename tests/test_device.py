"""`kernels/gpu/device.py`: a device is read from what PyTorch says of it; one that nobody named gets sensible numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hw3gpu.kernels.gpu import device as D
from hw3gpu.kernels.gpu.channel_plan import plan_batch_norm

NAMED = (D.A100, D.H100, D.H200, D.B200, D.RTX_4090, D.RTX_5090)
# name, kHz of the memory's clock, bits of its bus, bytes a second
SAID = {
    D.A100: ("NVIDIA A100-SXM4-40GB", 1_215_000, 5120),
    D.H100: ("NVIDIA H100 80GB HBM3", 2_619_000, 5120),
    D.H200: ("NVIDIA H200", 3_201_000, 6144),
    D.B200: ("NVIDIA B200", 3_996_000, 8192),
    D.RTX_4090: ("NVIDIA GeForce RTX 4090", 10_501_000, 384),
    D.RTX_5090: ("NVIDIA GeForce RTX 5090", 14_001_000, 512),
}


def said(device, name, clock, width, **more):
    """What `torch.cuda.get_device_properties` says of a device."""
    return SimpleNamespace(
        name=name, multi_processor_count=device.multiprocessors, max_threads_per_multi_processor=device.threads,
        regs_per_multiprocessor=device.registers, shared_memory_per_multiprocessor=device.shared_memory,
        L2_cache_size=device.l2, memory_clock_rate=clock, memory_bus_width=width, **more,
    )  # fmt: skip


@pytest.mark.parametrize("device", NAMED, ids=lambda device: device.name)
def test_the_constants_are_what_would_be_read(device):
    read = D.read(said(device, *SAID[device]))
    assert read.bandwidth == pytest.approx(device.bandwidth, rel=0.03)
    for field in ("multiprocessors", "registers", "threads", "shared_memory", "l2", "in_flight"):
        assert getattr(read, field) == getattr(device, field), field


def test_a_device_nobody_named():
    """Its need follows from its own bandwidth; an older PyTorch says less of it."""
    read = D.read(said(D.A100, "A new one", 1_215_000, 5120))
    assert D.A100.in_flight <= read.in_flight <= 2 * D.A100.in_flight
    bare = SimpleNamespace(name="An old one", multi_processor_count=66, max_threads_per_multi_processor=2048)
    read = D.read(bare)
    assert read.bandwidth == pytest.approx(D.H100.bandwidth / 2)
    assert read.registers == 65536
    assert 16 << 10 <= read.in_flight <= 64 << 10


def test_without_a_gpu_plans_are_an_h100s():
    assert D.device_of(torch.empty(3)) == D.device_of(torch.empty(3, device="meta")) == D.H100


@pytest.mark.parametrize("device", NAMED, ids=lambda device: device.name)
def test_long_channels_fill_every_device(device):
    plan = plan_batch_norm(32, 16, 112 * 112, 4, 1, False, 1, whole=False, device=device)
    assert plan.channel_blocks * plan.splits >= device.multiprocessors

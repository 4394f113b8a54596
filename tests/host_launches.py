"""Launches for CuPy arrays of the stand-in, whose memory is the host's."""

from __future__ import annotations

import contextlib

import fake_cupy
import torch

from hw3gpu._core import dispatch


def launch_on_the_host(monkeypatch, log, which):
    """Launches for CuPy arrays run the `which` kernels ('gpu': in Triton's interpreter) on the host, and are recorded."""
    view, place = dispatch.kernel_view(which), []

    class Launchers:
        def __init__(self, operation):
            self.operation = operation

        def __getattr__(self, name):
            def launch(first, *operands, **options):
                log.runs.append(fake_cupy.Run(f"{self.operation.__name__}.{name}", tuple(first.shape), *place[-1]))
                getattr(self.operation(which), name)(*map(view, (first, *operands)), **options)

            return launch

    @contextlib.contextmanager
    def stream(of):
        place.append(of)
        yield
        place.pop()

    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda ptr, device: (device, ptr))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    for of in (dispatch.softmax, dispatch.batch_norm, dispatch.cross_entropy, dispatch.token_log_probs, dispatch.moments):
        launchers = Launchers(of)
        monkeypatch.setattr(
            dispatch, of.__name__, lambda ran, of=of, launchers=launchers: launchers if ran == "gpu" else of(ran)
        )

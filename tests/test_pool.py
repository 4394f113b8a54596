"""Recycled memory of large outputs on the host: never while anything still sees it, bounded, in threads and forked children."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import threading
import time

import numpy as np
import pytest
import torch

import hw3gpu
import hw3gpu.functional as HF
from hw3gpu._core import outputs as _outputs
from hw3gpu._core import pool

SHAPE = (300, 1000)  # 1.2 MB in float32
NBYTES = 300 * 1000 * 4


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """What other tests and libraries have made is left out of the collections here, which would look through all of it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """An empty pool with its default bound."""
    monkeypatch.delenv(pool.VARIABLE, raising=False)
    gc.collect()
    hw3gpu.empty_cache()
    yield
    monkeypatch.undo()
    hw3gpu.empty_cache()


def outputs(n, value=None):
    """`n` new outputs, each written over whole."""
    made = [_outputs.output_like(torch.empty(SHAPE), 1)[0] for _ in range(n)]
    for i, out in enumerate(made):
        out.numpy().fill(-1.0 - i if value is None else value)  # torch's own threads are no good in a forked child
    return made


# ---------------------------------------------------------------------------------------------- what comes back, and when
@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_memory_is_used_again_once_its_array_is_gone(kind):
    x = torch.zeros(SHAPE) if kind == "torch" else np.zeros(SHAPE, np.float32)
    out = _outputs.output_like(x, 1)[0]
    address = _outputs._address(out)
    assert pool.idle_bytes() == 0
    del out
    assert NBYTES <= pool.idle_bytes() <= 1.15 * NBYTES
    assert _outputs._address(_outputs.output_like(x, 1)[0]) == address


class Keep(torch.autograd.Function):
    """Keeps its input as a saved tensor."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sum()

    @staticmethod
    def backward(ctx, upstream):
        return ctx.saved_tensors[0] * upstream


WATCHERS = {
    "a view": lambda y: y.view(-1),
    "a slice": lambda y: y[7:9, 3:5],
    "one element": lambda y: y[0, 0],
    "a transposed slice of a view": lambda y: y.view(1000, 300).T[5:7],
    "detached": lambda y: y.detach(),
    "detached, by data": lambda y: y.data[1],
    "its storage": lambda y: y.untyped_storage(),
    "NumPy's view": lambda y: y.detach().numpy(),
    "a slice of NumPy's view": lambda y: y.detach().numpy()[3:5, ::2],
    "DLPack": lambda y: np.from_dlpack(y.detach())[1:],
    "a memory view": lambda y: memoryview(y.detach().numpy()[3:5]),
    "a saved tensor": lambda y: Keep.apply(y.detach().requires_grad_()),
    "the graph of softmax": lambda y: HF.softmax(y.detach().requires_grad_(), 1).sum(),
    "a closure": lambda y: lambda: y,
    "a reference cycle": lambda y: (lambda cycle: cycle.append((cycle, y)) or cycle)([]),
}


def seen(watcher):
    """The numbers that the watcher sees."""
    if isinstance(watcher, torch.UntypedStorage):
        watcher = torch.empty(0).set_(watcher)
    elif callable(watcher):
        watcher = watcher()
    elif isinstance(watcher, list):
        watcher = watcher[0][1]
    elif isinstance(watcher, torch.Tensor) and watcher.grad_fn is not None and watcher.dim() == 0:
        node = watcher.grad_fn
        watcher = (node if hasattr(node, "saved_tensors") else node.next_functions[0][0]).saved_tensors[0]
    return np.array(watcher if not isinstance(watcher, torch.Tensor) else watcher.detach().numpy(), np.float32)


@pytest.mark.parametrize("name", WATCHERS)
def test_what_anything_still_sees_is_not_handed_out(name):
    """Hammered: 60 outputs of the same size are written over whole, some alive together, and the watcher sees no change."""
    y = outputs(1)[0]
    y.copy_(torch.arange(300_000.0).view(SHAPE))
    watcher = WATCHERS[name](y)
    before = seen(watcher)
    assert before.size > 0
    del y
    gc.collect()
    for _ in range(20):
        outputs(3)
    np.testing.assert_array_equal(seen(watcher), before)


def test_what_anything_still_sees_of_a_numpy_output_is_not_handed_out():
    y = hw3gpu.softmax(np.random.default_rng(0).standard_normal(SHAPE))
    views = [y[3:5, ::2], y.reshape(-1)[10:20], y.T[1], torch.from_numpy(y)[2:4].numpy(), memoryview(y[1])]
    before = [np.array(view) for view in views]
    x = np.empty_like(y)
    del y
    while views:
        for _ in range(20):
            _outputs.output_like(x, 1)[0].fill(-1.0)
        for view, expected in zip(views, before, strict=True):
            np.testing.assert_array_equal(np.array(view), expected)
        del views[0], before[0], view
    assert pool.idle_bytes() > 0


def test_results_and_gradients_of_several_steps_stay_what_they_were():
    def step(seed):
        z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        x = z.detach().view(20, 15, 1000).clone().requires_grad_()
        y = HF.batch_norm(x, None, None, training=True)
        HF.cross_entropy(z, torch.arange(300)).backward()
        y.backward(y.detach() + 1)
        return y.detach(), z.grad, x.grad

    kept = [step(seed) for seed in range(4)]
    for seed in (5, 6, 7):
        step(seed)
    for seed, results in enumerate(kept):
        for result, again in zip(results, step(seed), strict=True):
            assert torch.equal(result, again)


# ---------------------------------------------------------------------------------------------- layouts and storages
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "arrange",
    [
        lambda x: x,
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.permute(3, 1, 0, 2),
        lambda x: x[:, ::2, 1:],
        lambda x: x[:1].expand(32, -1, -1, -1),
    ],
    ids=["contiguous", "channels-last", "permuted", "sliced", "expanded"],
)
def test_an_output_has_the_strides_that_torch_would_give_it(arrange, dtype):
    x = arrange(torch.zeros(32, 8, 64, 80, dtype=dtype))
    out = _outputs.empty_like(x)
    like = torch.empty_like(x)
    assert (out.shape, out.stride(), out.dtype) == (like.shape, like.stride(), like.dtype)
    assert out.data_ptr() % 64 == 0
    assert not out._is_view()
    del out
    assert pool.idle_bytes() > 0


def test_a_numpy_output_has_the_strides_that_numpy_would_give_it():
    for x in (np.zeros((300, 1000)).T, np.zeros((8, 300, 1000))[::2, :, ::-1], np.zeros((1, 10**6))):
        out = _outputs.empty_like(x)
        assert out.strides == np.empty_like(x).strides
        assert out.flags.writeable
        assert out.flags.aligned


def test_large_numpy_arrays_of_any_layout_have_results():
    x = np.zeros((300, 9, 200), np.float32).transpose(0, 2, 1)
    assert hw3gpu.softmax(x, axis=1).strides == hw3gpu.batch_norm(x).y.strides == x.strides
    assert pool.idle_bytes() > 0


def test_a_subclass_gets_no_recycled_memory():
    class Marked(np.ndarray):
        pass

    assert type(_outputs.empty_like(np.zeros(SHAPE).view(Marked))) is Marked
    assert pool.idle_bytes() == 0


def test_a_storage_that_is_to_grow_refuses_and_stays_as_it_was():
    (y,) = outputs(1, 3.0)
    with pytest.raises(RuntimeError, match="not resizable"):
        y.resize_(400, 1000)
    y.resize_(10, 10)
    assert torch.equal(y, torch.full((10, 10), 3.0))


def test_shared_memory_leaves_the_pool():
    (y,) = outputs(1, 3.0)
    y.share_memory_()
    assert y.is_shared()
    outputs(3)
    assert bool((y == 3.0).all())


def test_pickling():
    (y,) = outputs(1, 3.0)
    copy = pickle.loads(pickle.dumps(y))
    del y
    outputs(3)
    assert bool((copy == 3.0).all())


# ---------------------------------------------------------------------------------------------- the bound
def test_small_outputs_are_not_recycled():
    out = _outputs.output_like(torch.empty(pool.SMALLEST // 4 - 1), 0)[0]
    del out
    assert pool.idle_bytes() == 0


def test_the_bound_holds_and_what_lay_idle_longest_goes_first(monkeypatch):
    monkeypatch.setenv(pool.VARIABLE, "4")
    made = outputs(5)
    addresses = [y.data_ptr() for y in made]
    while made:
        del made[0]
        assert pool.idle_bytes() <= 4 * 2**20
    assert pool.idle_bytes() >= 3 * NBYTES
    again = outputs(3)
    assert {y.data_ptr() for y in again} == set(addresses[2:])


def test_one_output_beyond_the_bound_is_not_kept(monkeypatch):
    monkeypatch.setenv(pool.VARIABLE, "1")
    outputs(2)
    assert pool.idle_bytes() == 0


def test_the_default_bound():
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert pool.limit() == min(2**30, memory // 8)


def test_zero_turns_it_off_at_once(monkeypatch):
    made = outputs(2)
    del made
    assert pool.idle_bytes() > 0
    monkeypatch.setenv(pool.VARIABLE, "0")
    (y,) = outputs(1)
    assert pool.idle_bytes() == 0
    del y
    assert pool.idle_bytes() == 0


@pytest.mark.parametrize("text", ["-1", "much", "nan", "inf"])
def test_a_bound_that_is_no_number_is_refused(monkeypatch, text):
    monkeypatch.setenv(pool.VARIABLE, text)
    with pytest.raises(ValueError, match=f"HW3GPU_CPU_CACHE_MB: expected a number of megabytes of at least 0, got '{text}'"):
        outputs(1)


def test_empty_cache_gives_back_what_is_idle_and_nothing_else():
    kept, _ = outputs(2)
    kept.fill_(5.0)
    del _
    assert pool.idle_bytes() > 0
    hw3gpu.empty_cache()
    assert pool.idle_bytes() == 0
    outputs(3)
    assert bool((kept == 5.0).all())


# ---------------------------------------------------------------------------------------------- threads and processes
def test_many_threads_share_no_block():
    """Each fills what it got with its own number and looks later whether it is still there; a collector runs all the while."""
    wrong, done = [], []

    def work(k):
        mine = []
        for i in range(100):
            (y,) = outputs(1, 1000.0 * k + i)
            mine.append((1000.0 * k + i, y if i % 2 else y[17:19].detach()))
            if len(mine) > 3:
                value, kept = mine.pop(i % 3)
                if not bool((kept == value).all()):
                    wrong.append((k, i))
        done.append(k)

    def collect():
        while len(done) < 8:
            gc.collect()
            time.sleep(0.01)

    threads = [threading.Thread(target=work, args=(k,), daemon=True) for k in range(8)]
    threads.append(threading.Thread(target=collect, daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(done) == list(range(8)), "not done within 60 s"
    assert wrong == []
    assert pool.idle_bytes() == sum(b.nbytes for blocks in pool._pool.idle.values() for _, b in blocks)


def test_memory_that_comes_back_while_the_lock_is_held_waits_for_nobody():
    """As when the garbage collector runs inside the pool itself."""
    (y,) = outputs(1)
    with pool._pool.lock:
        del y
        assert len(pool._pool.returned) == 1
    assert pool.idle_bytes() > 0


def in_a_child(y, answers):
    _, idle = outputs(2), pool.idle_bytes()
    del _
    answers.put((idle, pool.idle_bytes() > 0, float(y.numpy().min()), float(y.numpy().max())))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this platform")
@pytest.mark.parametrize("locked", [False, True], ids=["idle", "in the middle of a change"])
def test_a_forked_child_starts_with_nothing_idle_and_changes_nothing_here(locked):
    (y,) = outputs(1, 4.0)
    outputs(2)
    idle = pool.idle_bytes()
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=in_a_child, args=(y, answers), daemon=True)
    if locked:
        with pool._pool.lock:
            child.start()
    else:
        child.start()
    assert answers.get(timeout=60) == (0, True, 4.0, 4.0)
    child.join(30)
    assert child.exitcode == 0
    assert pool.idle_bytes() == idle
    assert bool((y == 4.0).all())

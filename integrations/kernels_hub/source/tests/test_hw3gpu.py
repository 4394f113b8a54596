"""Values and gradients against the formulas in float64; on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1)."""

import pytest
import torch

import kernels

hw3gpu = kernels.get_kernel("hw3gpu/hw3gpu", version=0, trust_remote_code=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

pytestmark = pytest.mark.kernels_ci


def made(shape, dtype=torch.float32, seed=0, grad=True):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    return values.to(dtype).to(DEVICE).requires_grad_(grad)


def holds(found, wanted, roundings=1):
    """found is wanted (float64) within some roundings of its dtype, and of the sums' float32, at the size of the tensor."""
    u = torch.finfo(found.dtype).eps
    sums = 16 * torch.finfo(torch.float64 if found.dtype is torch.float64 else torch.float32).eps
    bound = roundings * u * wanted.abs() + sums * wanted.abs().max()
    error = (found.detach().double() - wanted).abs()
    assert found.shape == wanted.shape
    assert bool((error <= bound).all()), f"{(error - bound).max().item()} over its bound"


# ---------------------------------------------------------------------------------------------- softmax
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), [((3, 37), -1), ((2, 5, 3), 1), ((40,), 0)])
def test_softmax(dtype, shape, dim):
    z, dy = made(shape, dtype), made(shape, dtype, 1, grad=False)
    y = hw3gpu.softmax(z, dim)
    (dz,) = torch.autograd.grad(y, z, dy)
    e = (z.detach().double() - z.detach().double().amax(dim, keepdim=True)).exp()
    p = e / e.sum(dim, keepdim=True)
    assert y.dtype == dz.dtype == dtype
    holds(y, p)
    kept, g = y.detach().double(), dy.double()  # the gradient is that of the y which was written
    holds(dz, kept * (g - (g * kept).sum(dim, keepdim=True)))


def test_softmax_of_a_transposed_matrix_and_of_one_number():
    z = made((6, 9)).detach().t()
    y = hw3gpu.softmax(z, 1)
    holds(y, torch.softmax(z.double(), 1))
    assert y.stride() == z.stride()
    assert hw3gpu.softmax(torch.tensor(3.0, device=DEVICE)).item() == 1.0
    no_view = made((2, 3, 4, 5)).detach().transpose(1, 2)  # what stands behind axis 1 has no one stride
    holds(hw3gpu.softmax(no_view, 1), torch.softmax(no_view.double(), 1))


# ---------------------------------------------------------------------------------------------- cross entropy
def loss_of(z, target, weight, ignore_index, reduction, smoothing):
    """The formula, row by row: q = w ((1 - ε) y + ε/V), loss = -Σ q log p; z (N, V, S)."""
    V = z.shape[1]
    log_p = z - z.logsumexp(1, keepdim=True)
    if target.is_floating_point():
        y, kept, w_t = target.double(), torch.ones_like(z[:, 0]), torch.ones_like(z[:, 0])
    else:
        kept = (target != ignore_index).double()
        y = torch.nn.functional.one_hot(torch.where(target == ignore_index, 0, target), V).movedim(-1, 1).double()
        w_t = kept if weight is None else kept * (y * weight.double()[None, :, None]).sum(1)
    q = (1 - smoothing) * y + smoothing / V
    if weight is not None:
        q = q * weight.double()[None, :, None]
    rows = -(q * log_p).sum(1) * kept
    return rows if reduction == "none" else rows.sum() if reduction == "sum" else rows.sum() / w_t.sum()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", ["plain", "all", "soft"])
def test_cross_entropy(dtype, reduction, options):
    z = made((4, 19, 3), dtype)
    target = torch.randint(19, (4, 3), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    target[1, 2] = -100
    weight, smoothing = None, 0.0
    if options == "all":
        weight, smoothing = made((19,), seed=3, grad=False).abs() + 0.1, 0.1
    if options == "soft":
        target = torch.softmax(made((4, 19, 3), torch.float64, 4, grad=False), 1).to(dtype)
    exact = z.detach().double().requires_grad_()
    wanted = loss_of(exact, target, weight, -100, reduction, smoothing)
    found = hw3gpu.cross_entropy(z, target, weight, reduction=reduction, label_smoothing=smoothing)
    upstream = torch.full_like(found, 0.75)
    (dz,) = torch.autograd.grad(found, z, upstream)
    (dexact,) = torch.autograd.grad(wanted, exact, upstream.double())
    assert found.dtype == dz.dtype == dtype
    holds(found, wanted.detach())
    holds(dz, dexact)


def test_cross_entropy_of_one_row_and_of_a_class_that_is_none():
    z = made((7,))
    target = torch.tensor(2, device=DEVICE)
    holds(hw3gpu.cross_entropy(z, target), torch.nn.functional.cross_entropy(z.detach().double(), target))
    rows = hw3gpu.cross_entropy(made((2, 5)), torch.tensor([1, 9], device=DEVICE), reduction="none")
    assert rows.isnan().tolist() == [False, True]


# ---------------------------------------------------------------------------------------------- batch normalisation
def normalised(x, mean, var, weight, bias, eps):
    shape = (1, -1, *(1,) * (x.dim() - 2))
    return (x - mean.view(shape)) / (var.view(shape) + eps).sqrt() * weight.view(shape) + bias.view(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(8, 5), (3, 4, 5, 6)])
def test_batch_norm(dtype, training, shape):
    x, dy = made(shape, dtype), made(shape, dtype, 1, grad=False)
    acc = torch.float64 if dtype is torch.float64 else torch.float32
    weight, bias, mean = (made((shape[1],), acc, seed) for seed in (2, 3, 4))
    running = mean.detach().clone(), mean.detach().abs() + 0.5
    exact = [v.detach().double().requires_grad_() for v in (x, weight, bias)]
    over = (0, *range(2, len(shape)))
    of_batch = exact[0].mean(over), exact[0].var(over, correction=0)
    used = of_batch if training else [v.double().clone() for v in running]
    wanted = normalised(exact[0], *used, *exact[1:], 1e-5)
    m = x.numel() // shape[1]
    unbiased = of_batch[0], of_batch[1] * m / (m - 1)
    kept = [0.7 * r.double() + 0.3 * new.detach() for r, new in zip(running, unbiased, strict=True)]

    found = hw3gpu.batch_norm(x, *running, weight, bias, training, momentum=0.3)
    gradients = torch.autograd.grad(found, (x, weight, bias), dy)
    assert found.dtype == gradients[0].dtype == dtype
    holds(found, wanted.detach(), 2)
    for one, exactly in zip(gradients, torch.autograd.grad(wanted, exact, dy.double()), strict=True):
        holds(one, exactly, 2)
    for r, expected in zip(running, kept if training else used, strict=True):
        holds(r, expected, 2)


def test_batch_norm_keeps_channels_last():
    x = made((2, 8, 4, 4), grad=False).to(memory_format=torch.channels_last)
    y = hw3gpu.batch_norm(x, training=True)
    assert y.is_contiguous(memory_format=torch.channels_last)
    one, none = torch.ones(8, device=DEVICE).double(), torch.zeros(8, device=DEVICE).double()
    exact = x.double()
    holds(y, normalised(exact, exact.mean((0, 2, 3)), exact.var((0, 2, 3), correction=0), one, none, 1e-5), 2)


# ---------------------------------------------------------------------------------------------- layers, graphs, errors
def adopted(module, layer):
    """As `kernelize` does it."""
    module.forward = layer.forward.__get__(module)
    return module


def test_layers_do_what_the_layers_they_replace_do():
    x, target = made((6, 5), grad=False), torch.tensor([0, 4, 1, 2, -100, 3], device=DEVICE)
    for options in ({}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}):
        ours = adopted(torch.nn.BatchNorm1d(5, **options).to(DEVICE), hw3gpu.layers.BatchNorm)
        theirs = torch.nn.BatchNorm1d(5, **options).to(DEVICE)
        for training in (True, True, False):
            a, b = ours.train(training)(x), theirs.train(training)(x)
            torch.testing.assert_close(a, b)
        for key, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], value)
    loss = torch.nn.CrossEntropyLoss(label_smoothing=0.2)
    wanted = loss(x, target)
    torch.testing.assert_close(adopted(loss, hw3gpu.layers.CrossEntropyLoss)(x, target), wanted)
    torch.testing.assert_close(adopted(torch.nn.Softmax(), hw3gpu.layers.Softmax)(x), torch.softmax(x, 1))


def test_halves_under_autocast_give_float32():
    z, target = made((3, 5), torch.bfloat16), torch.tensor([1, 0, 4], device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss, y = hw3gpu.cross_entropy(z, target), hw3gpu.softmax(z)
    assert loss.dtype == y.dtype == torch.float32
    holds(loss, torch.nn.functional.cross_entropy(z.detach().double(), target))
    holds(y, torch.softmax(z.detach().double(), -1))
    loss.backward()
    assert z.grad.dtype == torch.bfloat16


def test_layers_compile_without_a_break():
    def step(x, target):
        return loss(torch.cat((norm(x), softmax(x)), 1), target)

    norm = adopted(torch.nn.BatchNorm1d(5).to(DEVICE), hw3gpu.layers.BatchNorm)
    softmax = adopted(torch.nn.Softmax(1), hw3gpu.layers.Softmax)
    loss = adopted(torch.nn.CrossEntropyLoss(), hw3gpu.layers.CrossEntropyLoss)
    x, target = made((4, 5)), torch.tensor([1, 0, 9, 2], device=DEVICE)
    eager = torch.autograd.grad(step(x, target), x)
    mean = norm.running_mean.clone()
    norm.reset_running_stats()
    compiled = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(x, target), x)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(norm.running_mean, mean)


def test_operators_hold_pytorchs_own_checks():
    """`opcheck`: schemas, fake tensors, autograd and the traced backward."""
    from torch.library import opcheck

    x, target = made((4, 6)), torch.tensor([1, 0, 5, 2], device=DEVICE)
    ones = torch.ones(6, device=DEVICE, requires_grad=True)
    opcheck(hw3gpu._softmax._forward, (x, 1))
    opcheck(hw3gpu._cross_entropy._forward, (x, target, None, -100, 0.0, "mean"))
    opcheck(hw3gpu._batch_norm._training, (x, ones, ones, 1e-5))
    opcheck(hw3gpu._batch_norm._normalize, (x, torch.ones((3, 6), device=DEVICE), ones, None))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda z: hw3gpu.softmax(z, 2), IndexError, "dim"),
        (lambda z: hw3gpu.softmax(z.long()), TypeError, "z: expected"),
        (lambda z: hw3gpu.cross_entropy(z, torch.zeros(3, dtype=torch.int64, device=DEVICE)), ValueError, "target: expected"),
        (lambda z: hw3gpu.cross_entropy(z, z[:, 0].int()), TypeError, "target: expected int64"),
        (lambda z: hw3gpu.cross_entropy(z, z, reduction="avg"), ValueError, "reduction: expected"),
        (lambda z: hw3gpu.batch_norm(z), ValueError, "running_mean and running_var"),
        (lambda z: hw3gpu.batch_norm(z[:1], training=True), ValueError, "more than 1 value per channel"),
        (lambda z: hw3gpu.batch_norm(z, weight=z[0, :2], training=True), ValueError, "weight: expected"),
    ],
)
def test_errors_name_the_argument(call, error, words):
    with pytest.raises(error, match=words):
        call(made((2, 5), grad=False))

"""The differentiable trace minimum (`hw3gpu._torch.trace`, in `hw3gpu.functional` for users)."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from hw3gpu._torch import trace  # noqa: E402
from hw3gpu._torch.trace import minimize_trace  # noqa: E402

gradcheck = torch.autograd.gradcheck


def symmetric(a):
    return (a + a.mH) / 2


def leaf(*shape, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, dtype=dtype, generator=generator).to(device).requires_grad_()


def with_eigenvalues(eigenvalues, device="cpu"):
    q = torch.linalg.qr(leaf(len(eigenvalues), len(eigenvalues)).detach())[0]
    return symmetric(q * torch.tensor(eigenvalues, dtype=torch.float64) @ q.T).to(device).requires_grad_()


QUANTITIES = {
    "value": lambda r: r.value,
    "projector": lambda r: r.projector,
    "a function of both": lambda r: torch.sin(r.projector).sum() * r.value,
}


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("largest", [False, True], ids=["smallest", "largest"])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_gradcheck(device, quantity, largest, k):
    sigma = leaf(5, 5, device=device)
    assert gradcheck(lambda a: QUANTITIES[quantity](minimize_trace(symmetric(a), k, largest=largest)), sigma)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_gradcheck_of_batches_and_complex_matrices(device, quantity):
    assert gradcheck(lambda a: QUANTITIES[quantity](minimize_trace(symmetric(a), 2)), leaf(2, 2, 4, 4, device=device))
    hermitian = leaf(4, 4, dtype=torch.complex128, device=device)
    assert gradcheck(lambda a: abs(QUANTITIES[quantity](minimize_trace(symmetric(a), 2))), hermitian)


@pytest.mark.parametrize("k", [3, 4], ids=["k = the cluster", "k = the cluster and one"])
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_degeneracy_inside_the_k_and_among_the_others_is_exact(device, quantity, k):
    sigma = with_eigenvalues([1.0, 1, 1, 2, 3, 3], device)
    assert gradcheck(lambda a: QUANTITIES[quantity](minimize_trace(symmetric(a), k)), sigma)


def test_where_torch_divides_by_zero(device):
    sigma = torch.diag(torch.tensor([1.0, 1, 1, 2, 3], dtype=torch.float64, device=device)).requires_grad_()
    weight = symmetric(leaf(5, 5, device=device).detach())
    (minimize_trace(sigma, 3).projector * weight).sum().backward()
    # (5.16): only the entries between the cluster and the others, over the differences of their eigenvalues
    expected = torch.zeros_like(weight)
    for i, j in [(i, j) for i in range(3) for j in (3, 4)]:
        expected[i, j] = expected[j, i] = weight[i, j] / (sigma[i, i] - sigma[j, j]).item()
    torch.testing.assert_close(sigma.grad, expected)
    theirs = sigma.detach().clone().requires_grad_()
    phi = torch.linalg.eigh(theirs)[1][:, :3]
    (phi @ phi.T * weight).sum().backward()
    assert not torch.isfinite(theirs.grad).all()


def test_a_zero_gap_has_no_derivative(device):
    sigma = with_eigenvalues([1.0, 1, 1, 2, 3, 3], device)
    result = minimize_trace(sigma, 2)
    assert result.value.item() == pytest.approx(2.0)  # the value itself is there
    for quantity in (result.value, result.projector.sum()):
        with pytest.raises(ValueError, match="the gap between eigenvalues k and k \\+ 1 is zero within rounding"):
            quantity.backward(retain_graph=True)
    assert sigma.grad is None


def test_the_gradient_of_the_value_is_the_projector(device):
    sigma = symmetric(leaf(200, 200, device=device).detach()).requires_grad_()
    result = minimize_trace(sigma, 3)
    (2 * result.value).backward()
    torch.testing.assert_close(sigma.grad, 2 * result.projector.detach())
    assert result.gap.requires_grad is False
    assert result.eigenvalues.requires_grad is False


def test_float32_gradients_are_computed_in_float64(device):
    double = with_eigenvalues([1.0, 1 + 1e-4, 2, 3], device)
    single = double.detach().float().requires_grad_()
    direction = leaf(4, 4, device=device).detach()
    for sigma in (double, single):
        (minimize_trace(sigma, 1).projector * direction.to(sigma.dtype)).sum().backward()
    # of size 1 / gap = 1e4; Σ itself was rounded by 6e-8, which moves the gap by 1e-3 of itself
    assert single.grad.dtype == torch.float32
    error = (single.grad.double() - double.grad).norm() / double.grad.norm()
    assert error < 1e-2


def test_a_second_derivative_is_refused(device):
    sigma = with_eigenvalues([1.0, 2, 3], device)
    (gradient,) = torch.autograd.grad(minimize_trace(sigma, 1).value, sigma, create_graph=True)
    with pytest.raises(RuntimeError, match="a second derivative was asked for"):
        (gradient.square().sum() + sigma.sum()).backward()


@pytest.mark.parametrize(
    ("sigma", "k", "options", "error", "message"),
    [
        ([[1.0]], 1, {}, TypeError, r"covariance: expected a torch\.Tensor, got builtins\.list"),
        (torch.eye(3, dtype=torch.bfloat16), 1, {}, TypeError, "covariance: .*got bfloat16, whose 8 bits"),
        (torch.eye(3), 0, {}, ValueError, "k: expected 1 <= k <= m = 3, got 0"),
        (torch.eye(3), 1.5, {}, TypeError, "k: expected an integer, got 1.5"),
        (torch.ones(2, 3), 1, {}, ValueError, "covariance: expected square matrices"),
        (torch.eye(3).cumsum(0), 1, {}, ValueError, "covariance: expected a symmetric matrix"),
        (torch.eye(3) / 0, 1, {}, ValueError, "covariance: expected finite values"),
        (torch.eye(3), 1, {"method": "jacobi"}, ValueError, "method: expected one of auto, .*, got 'jacobi'"),
    ],
)
def test_errors(sigma, k, options, error, message):
    with pytest.raises(error, match=message):
        minimize_trace(sigma, k, **options)


@pytest.mark.graphs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_it_keeps_the_rules_of_torch_library_and_compiles(device, dtype, batch):
    """In one graph, with the numbers and gradients of the eager call."""
    sigma = symmetric(leaf(*batch, 4, 4, dtype=dtype, device=device).detach()).requires_grad_()
    torch.library.opcheck(trace.FORWARD, (sigma, 2, False, "auto"), test_utils=("test_schema", "test_faketensor"))

    def step(a):
        found = minimize_trace(a, 2, largest=True)
        return found.value.sum() + found.projector.abs().square().sum() + found.gap.sum()

    eager, compiled = step(sigma), torch.compile(step, fullgraph=True, backend="aot_eager")(sigma)
    for ours, expected in zip(torch.autograd.grad(compiled, sigma), torch.autograd.grad(eager, sigma), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=0)

import math
from pathlib import Path

import pytest
import torch

from alexnet_repro.net import lrn_cpu
from alexnet_repro.net.lrn import LocalResponseNorm, SameMapNorm, plain_local_response_norm


@pytest.fixture(params=["compiled", "operations"], autouse=True)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run every test with lrn_cpu.c and without it."""
    if request.param == "operations":
        monkeypatch.setattr(lrn_cpu, "library", lambda: None)
    elif lrn_cpu.library() is None:
        pytest.skip("there is no C compiler")
    return request.param


CASES = [(5, 1e-4, 0.75, 2.0, 2), (5, 0.02, 0.75, 2.0, 1), (3, 0.1, 0.5, 1.0, 2), (9, 0.001, 0.75, 1.0, 1)]


def by_hand(a: torch.Tensor, n: int, alpha: float, beta: float, k: float, groups: int) -> torch.Tensor:
    """Compute the normalisation of Section 3.3 in Python floats, one neuron at a time."""
    out = torch.empty_like(a, dtype=torch.float64)
    maps = a.shape[1] // groups
    for image in range(a.shape[0]):
        for i in range(a.shape[1]):
            first = max(i // maps * maps, i - n // 2)
            last = min(i // maps * maps + maps - 1, i + n // 2)
            for y in range(a.shape[2]):
                for x in range(a.shape[3]):
                    total = sum(float(a[image, j, y, x]) ** 2 for j in range(first, last + 1))
                    out[image, i, y, x] = float(a[image, i, y, x]) / math.pow(k + alpha * total, beta)
    return out


@pytest.mark.parametrize(("n", "alpha", "beta", "k", "groups"), CASES)
def test_both_forms_equal_the_sum_of_section_3_3(n: int, alpha: float, beta: float, k: float, groups: int) -> None:
    a = torch.randn(2, 12, 3, 4, dtype=torch.float64) * 30
    expected = by_hand(a, n, alpha, beta, k, groups)
    torch.testing.assert_close(plain_local_response_norm(a, n, alpha, beta, k, groups), expected)
    torch.testing.assert_close(LocalResponseNorm(n, alpha, beta, k, groups)(a), expected)
    single = LocalResponseNorm(n, alpha, beta, k, groups)(a.float())
    torch.testing.assert_close(single.double(), expected, rtol=3e-6, atol=1e-5)


def test_torch_lrn_with_five_times_alpha_equals_ours() -> None:
    a = torch.randn(2, 16, 5, 5) * 50
    theirs = torch.nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)(a)
    torch.testing.assert_close(LocalResponseNorm(5, 1e-4, 0.75, 2.0)(a), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n", "alpha", "beta", "k", "groups"), CASES)
def test_gradient_equals_finite_differences(n: int, alpha: float, beta: float, k: float, groups: int) -> None:
    a = torch.randn(2, 12, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(LocalResponseNorm(n, 100 * alpha, beta, k, groups), (a,))


# The normalisation layers of conv1 and conv2 (Sec. 3.3) and of the CIFAR-10 net. lrn_cpu.c has specialised loops for them.
LAYERS_OF_THE_PAPER = [
    ((5, 96, 55, 55), (5, 1e-4, 0.75, 2.0, 2)),
    ((5, 256, 27, 27), (5, 1e-4, 0.75, 2.0, 2)),
    ((200, 64, 12, 12), (9, 0.001 / 9, 0.75, 1.0, 1)),
]


@pytest.mark.parametrize(("shape", "constants"), LAYERS_OF_THE_PAPER)
def test_output_and_gradient_of_large_inputs_equal_the_plain_form(shape: tuple[int, ...], constants: tuple) -> None:
    a = (torch.randn(shape) * 60).requires_grad_()
    grad = torch.randn(shape)
    norm = LocalResponseNorm(*constants)
    out = norm(a)
    out.backward(grad)
    fast, a.grad = a.grad, None
    exact = a.detach().double().requires_grad_()
    expected = plain_local_response_norm(exact, *constants)
    expected.backward(grad.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    assert fast is not None
    assert exact.grad is not None
    torch.testing.assert_close(fast.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_bfloat16_error_is_that_of_rounding() -> None:
    a = (torch.randn(2, 96, 27, 27) * 60).bfloat16().requires_grad_()
    grad = torch.randn(2, 96, 27, 27).bfloat16()
    norm = LocalResponseNorm(5, 1e-4, 0.75, 2.0, groups=2)
    out = norm(a)
    out.backward(grad)
    exact = a.detach().double().requires_grad_()
    expected = plain_local_response_norm(exact, 5, 1e-4, 0.75, 2.0, groups=2)
    expected.backward(grad.double())
    assert out.dtype == torch.bfloat16
    assert (out - expected).norm() < 0.002 * expected.norm()  # rounding to bfloat16 alone gives 0.0017
    assert a.grad is not None
    assert exact.grad is not None
    assert (a.grad - exact.grad).norm() < 0.002 * exact.grad.norm()


def test_float16_does_not_overflow() -> None:
    a = torch.full((1, 8, 2, 2), 1000.0, dtype=torch.float16)
    expected = 1000 / (2 + 1e-4 * 5e6) ** 0.75
    assert LocalResponseNorm(5, 1e-4, 0.75, 2.0)(a)[0, 4, 0, 0].item() == pytest.approx(expected, rel=1e-3)


def same_map_by_hand(a: torch.Tensor, size: int, alpha: float, beta: float, k: float) -> torch.Tensor:
    """Compute the 2012 code's normalisation within a map, one position at a time."""
    out = torch.empty_like(a, dtype=torch.float64)
    height, width = a.shape[2:]
    half = size // 2
    for y in range(height):
        for x in range(width):
            window = a[:, :, max(0, y - half) : y + half + 1, max(0, x - half) : x + half + 1].double()
            out[:, :, y, x] = a[:, :, y, x].double() / (k + alpha * (window**2).sum((2, 3))) ** beta
    return out


def test_same_map_norm_equals_a_sum_clipped_at_the_edges() -> None:
    a = torch.randn(2, 3, 9, 7, dtype=torch.float64) * 50
    expected = same_map_by_hand(a, 5, 0.001 / 25, 0.75, 1.0)
    torch.testing.assert_close(SameMapNorm(5, 0.001 / 25, 0.75, 1.0)(a), expected)
    torch.testing.assert_close(
        SameMapNorm(5, 0.001 / 25, 0.75, 1.0)(a.float()).double(), expected, rtol=1e-5, atol=1e-5
    )


def test_gradient_of_same_map_norm_equals_finite_differences() -> None:
    a = torch.randn(2, 2, 6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SameMapNorm(5, 0.05, 0.75, 1.0), (a,))
    assert torch.autograd.gradcheck(SameMapNorm(3, 0.2, 0.5, 2.0), (a,))


def test_bfloat16_error_of_same_map_norm_is_that_of_rounding() -> None:
    a = (torch.randn(4, 256, 27, 27) * 30).bfloat16().requires_grad_()
    grad = torch.randn(4, 256, 27, 27).bfloat16()
    out = SameMapNorm(5, 0.001 / 25, 0.75, 1.0)(a)
    out.backward(grad)
    exact = a.detach().double().requires_grad_()
    expected = SameMapNorm(5, 0.001 / 25, 0.75, 1.0)(exact)
    expected.backward(grad.double())
    assert (out - expected).norm() < 0.002 * expected.norm()
    assert a.grad is not None
    assert exact.grad is not None
    assert (a.grad - exact.grad).norm() < 0.003 * exact.grad.norm()


@pytest.mark.parametrize("maps", [12, 48, 128, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [5, 3, 33])
def test_both_forms_agree(maps: int, dtype: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare every loop of lrn.c, with several threads, with the form without lrn.c."""
    norm = LocalResponseNorm(size, 1e-3, 0.75, 1.0, groups=2)
    a = (torch.randn(3, 2 * maps, 5, 7) * 30).to(dtype)
    grad = torch.randn_like(a)
    found = []
    for library in (lrn_cpu.library, lambda: None):
        monkeypatch.setattr(lrn_cpu, "library", library)
        x = a.clone().requires_grad_()
        norm(x).backward(grad)
        found.append((norm(a), x.grad))
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.008, "atol": 1e-3}
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def test_nan_inputs_give_nan_outputs() -> None:
    a = torch.ones(1, 8, 1, 1, dtype=torch.bfloat16)
    a[0, 7] = math.nan
    assert LocalResponseNorm(5, 1e-4, 0.75, 2.0)(a).isnan().flatten().tolist() == [False] * 5 + [True] * 3


def test_missing_compiler_gives_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, form: str) -> None:
    if form == "operations":
        pytest.skip("does not use lrn.c")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    lrn_cpu.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"lrn_cpu\.c can't be compiled .*no-such-compiler"):
            out = LocalResponseNorm(5, 1e-4, 0.75, 2.0)(torch.ones(1, 8, 2, 2))
        assert out[0, 4, 0, 0].item() == pytest.approx((2 + 5e-4) ** -0.75)
    finally:
        lrn_cpu.library.cache_clear()


def test_empty_batch_is_accepted() -> None:
    assert LocalResponseNorm(5, 1e-4, 0.75, 2.0)(torch.zeros(0, 8, 3, 3)).shape == (0, 8, 3, 3)


def test_invalid_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="odd"):
        LocalResponseNorm(4, 1e-4, 0.75, 2.0)
    with pytest.raises(ValueError, match="odd"):
        SameMapNorm(2, 1e-4, 0.75, 2.0)
    with pytest.raises(ValueError, match="7 maps can't be split evenly over 2 towers"):
        LocalResponseNorm(5, 1e-4, 0.75, 2.0, groups=2)(torch.zeros(1, 7, 2, 2))

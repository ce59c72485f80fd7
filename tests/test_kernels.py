"""The Triton kernels of normalisation, pooling and dropout: interpreted on a CPU, compiled for GPUs that need not be there, and run where there is one."""

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from alexnet_repro.net import dropout_gpu, layers, lrn_gpu, pool_gpu
from alexnet_repro.net.alexnet import AlexNet
from alexnet_repro.net.dropout import kept_neurons
from alexnet_repro.net.lrn import LocalResponseNorm, SameMapNorm, plain_local_response_norm
from alexnet_repro.net.pool import _max_pool_gpu, max_pool

ROOT = Path(__file__).parent.parent
triton = pytest.importorskip("triton")
# (size, alpha, beta, k, towers); without towers, the window is within a map
CASES = [
    (5, 1e-4, 0.75, 2.0, 2),
    (9, 0.001 / 9, 0.75, 1.0, 1),
    (3, 0.1, 0.5, 1.0, 2),
    (5, 0.001 / 25, 0.75, 1.0, 0),
    (3, 0.05, 0.6, 1.0, 0),
]
# With 300 maps, one or two towers have more than a program computes at once.
SHAPES = [(2, 12, 5, 7), (1, 300, 2, 3)]
# (size, ceil, height, width) of a pooling layer
POOLINGS = [(3, True, 13, 6), (3, False, 6, 7), (2, True, 7, 8), (2, False, 7, 5)]
# Relative errors of a result that is rounded to each type. The interpreter cuts bfloat16 off instead of rounding it.
ROUNDING = {torch.float32: 3e-7, torch.bfloat16: 6e-3, torch.float16: 5e-4}
ON_GPU = {torch.float32: 2e-6, torch.bfloat16: 3e-3, torch.float16: 1e-3}  # whose powers are approximate


def exact(a: torch.Tensor, db: torch.Tensor, size: int, alpha: float, beta: float, k: float, towers: int) -> tuple:
    """Return value and gradient in float64, from the plain form where there is one."""
    x = a.double().requires_grad_()
    within = SameMapNorm(size, alpha, beta, k)
    y = plain_local_response_norm(x, size, alpha, beta, k, towers) if towers else within(x)
    y.backward(db.double())
    return y.detach(), x.grad


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def interpreted_errors(tf32: bool) -> list[float]:
    """Return the relative errors of values and gradients, for each of SHAPES, CASES and dtypes."""
    lrn_gpu.has_tf32 = lambda a: tf32
    errors = []
    for shape, constants in product(SHAPES, CASES):
        for dtype in ROUNDING:
            a = (torch.randn(shape) * 30).to(dtype).contiguous(memory_format=torch.channels_last)
            db = torch.randn_like(a)
            b, da = torch.empty_like(a), torch.empty_like(a)
            lrn_gpu.forward(a, b, *constants)
            lrn_gpu.backward(a, db, da, *constants)
            errors += [relative_error(x, y) for x, y in zip((b, da), exact(a, db, *constants), strict=True)]
    return errors


def small_maps(dtype: torch.dtype, size: int, height: int, width: int) -> torch.Tensor:
    """Return maps with many equal values, in which each of the equal maxima could be the largest, and one NaN."""
    x = (torch.randn(2, 40, height, width) * 2).round().to(dtype)
    x[1, 3, size - 1, size - 1] = torch.nan
    return x.contiguous(memory_format=torch.channels_last)


def interpreted_pooling_agrees() -> bool:
    """Return whether the kernels choose the maxima that PyTorch chooses, and give them the same gradients."""
    agree = []
    for size, ceil, height, width in POOLINGS:
        for dtype in ROUNDING:
            x = small_maps(dtype, size, height, width).requires_grad_()
            expected = F.max_pool2d(x, size, 2, ceil_mode=ceil)
            dy = torch.randint_like(expected, -8, 8)  # whose sums are exact
            expected.backward(dy)
            own = x.detach().clone().requires_grad_()
            y = _max_pool_gpu(own, size, ceil)[0]
            y.backward(dy)
            agree += [torch.equal(y.nan_to_num(99), expected.nan_to_num(99)), torch.equal(own.grad, x.grad)]
        torch.library.opcheck(_max_pool_gpu, (own, size, ceil), test_utils=("test_schema", "test_faketensor"))
    return all(agree)


def interpreted_masks_agree() -> bool:
    """Return whether the kernel drops the neurons that the operations of PyTorch drop."""
    source = torch.tensor([2**32 - 5, 77, 2**31 + 3, 9])  # words beyond the range of int32
    expected = kept_neurons(source, 5, 44, 7, [0, 1], 0.3)
    kept = torch.zeros(5, 2, 44, dtype=torch.bool)
    for tower in range(2):
        dropout_gpu.write(kept, tower, source, 7 * 256 + tower, round(0.3 * 2**32))
    return torch.equal(kept.flatten(1), expected)


def interpreted(call: str) -> list[str]:
    """Call a function of this file with the kernels interpreted, and return the words that it printed.

    It runs in a process of its own, since Triton decides on this when it is imported.
    """
    code = f"from tests import test_kernels; print(*test_kernels.{call})"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_interpreted_masks_equal_those_of_pytorch_operations() -> None:
    assert interpreted("interpreted_masks_agree().__str__().split()") == ["True"]


def test_interpreted_pooling_equals_that_of_pytorch() -> None:
    assert interpreted("interpreted_pooling_agrees().__str__().split()") == ["True"]


@pytest.mark.parametrize("tf32", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_interpreted_kernels_equal_the_plain_form(tf32: bool) -> None:
    errors = [float(word) for word in interpreted(f"interpreted_errors({tf32})")]
    limits = len(SHAPES) * len(CASES) * [limit for limit in ROUNDING.values() for _ in range(2)]
    assert [(i, error) for i, (error, limit) in enumerate(zip(errors, limits, strict=True)) if error >= limit] == []


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize(
    "name",
    [
        "across_maps_forward",
        "across_maps_backward",
        "within_map_forward",
        "within_map_spread",
        "within_map_backward",
        "write_maxima",
        "write_gradient",
        "write_kept",
    ],
)
def test_kernels_compile_for_ampere_and_hopper(
    name: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compile to machine code with bfloat16 inputs. Each value is read eight at a time, and no more often than needed."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    module = next(module for module in (dropout_gpu, pool_gpu, lrn_gpu) if name in vars(module))
    kernel = getattr(module, name)
    rows, columns = (lrn_gpu.ROWS_ACROSS, 128) if name.startswith("across") else (lrn_gpu.ROWS, lrn_gpu.COLUMNS)
    constants = {
        "SIZE": 3 if module is pool_gpu else 5,
        "BETA": 0.75,
        "ROWS": rows,
        "COLUMNS": columns,
        "HALO": 0,
        "TF32": True,
    }
    constants |= {"BLOCK": dropout_gpu.BLOCK}
    types = dict.fromkeys(("count", "images", "rows", "maps", "height", "width"), "i32")
    types |= dict.fromkeys(("pooled_height", "pooled_width"), "i32") | dict.fromkeys(("alpha", "k"), "fp32")
    types |= dict.fromkeys(("blocks", "number", "towers"), "i32") | {"stream": "i64", "threshold": "i64"}
    types |= dict.fromkeys(constants, "constexpr") | {"direct": "*fp32", "spread": "*fp32"}
    types |= {"kept": "*i1", "source": "*i64", "largest": "*u8"}
    signature = {argument: types.get(argument, "*bf16") for argument in kernel.arg_names}
    constexprs = {n: constants[n] for n in signature if n in constants}
    multiples = [i for i, (n, kind) in enumerate(signature.items()) if n == "maps" or kind.startswith("*")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in multiples}  # as Triton itself finds out at a call
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert len(compiled.asm["cubin"]) > 1000
    if name == "write_kept":
        return
    eights = rows * columns // (8 * 32 * compiled.metadata.num_warps)  # per thread
    reads = {"across_maps_forward": 1, "across_maps_backward": 2, "write_maxima": 9, "write_gradient": 4 + 4}
    reads |= {"within_map_forward": 25 + 1, "within_map_spread": 25 + 2, "within_map_backward": 2 * (25 + 1) + 1}
    assert compiled.asm["ptx"].count("ld.global") == reads[name] * eights
    if capability == 90:  # each window sum is two products, of 8 maps at a time
        sums = {"across_maps_forward": 1, "across_maps_backward": 2}.get(name, 0)
        assert compiled.asm["ptx"].count("wgmma.mma_async") == 2 * sums * columns // 8


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("constants", CASES)
@pytest.mark.parametrize("shape", [(8, 96, 55, 55), (8, 256, 27, 27), *SHAPES])
def test_kernels_on_a_gpu_equal_the_plain_form(shape: tuple, constants: tuple, dtype: torch.dtype) -> None:
    a = (torch.randn(shape, device="cuda") * 30).to(dtype).requires_grad_()
    db = torch.randn(shape, device="cuda").to(dtype)
    size, alpha, beta, k, towers = constants
    assert lrn_gpu.serves(a, *constants)
    b = (LocalResponseNorm(*constants) if towers else SameMapNorm(size, alpha, beta, k))(a)
    b.backward(db)
    for found, expected in zip((b, a.grad), exact(a.detach(), db, *constants), strict=True):
        assert relative_error(found, expected) < ON_GPU[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("pooling", [*POOLINGS, (3, True, 55, 55), (2, True, 27, 27)], ids=str)
def test_pooling_on_a_gpu_equals_that_on_a_cpu(
    pooling: tuple[int, bool, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "compiled_for_gpu", lambda x: x.is_cuda)
    size, ceil, height, width = pooling
    x = small_maps(dtype, size, height, width).requires_grad_()
    on_gpu = x.detach().cuda().requires_grad_()
    assert pool_gpu.serves(on_gpu)
    y, expected = max_pool(on_gpu, size, ceil), F.max_pool2d(x, size, 2, ceil_mode=ceil)
    dy = torch.randint_like(expected, -8, 8)
    y.backward(dy.cuda())
    expected.backward(dy)
    assert torch.equal(y.detach().cpu().nan_to_num(99), expected.detach().nan_to_num(99))
    assert on_gpu.grad is not None
    assert x.grad is not None
    assert torch.equal(on_gpu.grad.cpu(), x.grad)


@pytest.mark.gpu
def test_masks_on_a_gpu_equal_those_on_a_cpu() -> None:
    source = torch.tensor([2**32 - 5, 77, 2**31 + 3, 9])
    on_gpu = kept_neurons(source.cuda(), 128, 2048, 7, [0, 1], 0.5)
    assert torch.equal(on_gpu.cpu(), kept_neurons(source, 128, 2048, 7, [0, 1], 0.5))


@pytest.mark.parametrize(
    "options",
    [{}, {"towers": 1}, {"pooling": "non_overlapping"}, {"layer1_order": "norm_pool_relu", "same_map_norm": True}],
    ids=str,
)
def test_layers_compiled_for_a_gpu_equal_those_that_are_not(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """conv1 as a convolution of blocks, and each tower's convolutions apart, traced as one graph, in float64 on a CPU."""
    torch.manual_seed(0)
    net = AlexNet(10, width=0.0625, image_size=115, init="as_run", **options).double()
    images, labels = 60 * torch.randn(3, 3, 115, 115, dtype=torch.float64), torch.arange(3)

    def training_step(forward: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        net.draw_dropout(0, 0)
        logits = forward(images)
        return [logits, *torch.autograd.grad(F.cross_entropy(logits, labels), list(net.parameters()))]

    plain, shapes, conv2d = training_step(net), [], F.conv2d
    monkeypatch.setattr(layers, "compiled_for_gpu", lambda x: True)
    monkeypatch.setattr(F, "conv2d", lambda x, w, *rest: shapes.append(w.shape) or conv2d(x, w, *rest))
    apart = training_step(net)
    assert shapes[0] == (net.conv1.out_channels, 48, 3, 3)
    assert len(shapes) == (5 if net.towers == 1 else 8)
    monkeypatch.setattr(F, "conv2d", conv2d)
    compiled = training_step(torch.compile(net, backend="aot_eager", fullgraph=True))
    for one, other, expected in zip(apart, compiled, plain, strict=True):
        assert (one - expected).norm() <= 1e-12 * expected.norm()
        assert (other - expected).norm() <= 1e-12 * expected.norm()

"""The Triton kernels of normalisation and dropout: interpreted on a CPU, compiled for GPUs that need not be there, and run where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alexnet_repro.net import dropout_gpu, lrn_gpu
from alexnet_repro.net.dropout import kept_neurons
from alexnet_repro.net.lrn import LocalResponseNorm, SameMapNorm, plain_local_response_norm

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


def interpreted_errors() -> list[float]:
    """Return the relative errors of values and gradients, for each of CASES and dtypes."""
    errors = []
    for constants in CASES:
        for dtype in ROUNDING:
            a = (torch.randn(2, 12, 5, 7) * 30).to(dtype).contiguous(memory_format=torch.channels_last)
            db = torch.randn_like(a)
            b, da = torch.empty_like(a), torch.empty_like(a)
            lrn_gpu.forward(a, b, *constants)
            lrn_gpu.backward(a, db, da, *constants)
            errors += [relative_error(x, y) for x, y in zip((b, da), exact(a, db, *constants), strict=True)]
    return errors


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


def test_interpreted_kernels_equal_the_plain_form() -> None:
    errors = [float(word) for word in interpreted("interpreted_errors()")]
    assert len(errors) == 2 * len(CASES) * len(ROUNDING)
    for error, limit in zip(errors, len(CASES) * [limit for limit in ROUNDING.values() for _ in range(2)], strict=True):
        assert error < limit


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "name",
    [
        "across_maps_forward",
        "across_maps_backward",
        "within_map_forward",
        "within_map_spread",
        "within_map_backward",
        "write_kept",
    ],
)
def test_kernels_compile_for_ampere_and_hopper(
    name: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compile to machine code with bfloat16 inputs. A neighbour that several windows share is read once."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(dropout_gpu if name == "write_kept" else lrn_gpu, name)
    constants = {"SIZE": 5, "BETA": 0.75, "BLOCK": lrn_gpu.BLOCK}
    types = dict.fromkeys(("count", "maps", "height", "width"), "i32") | dict.fromkeys(("alpha", "k"), "fp32")
    types |= dict.fromkeys(("blocks", "number", "towers"), "i32") | {"stream": "i64", "threshold": "i64"}
    types |= dict.fromkeys(constants, "constexpr") | {"direct": "*fp32", "spread": "*fp32"}
    types |= {"kept": "*i1", "source": "*i64"}
    signature = {argument: types.get(argument, "*bf16") for argument in kernel.arg_names}
    source = ASTSource(
        fn=kernel, signature=signature, constexprs={n: constants[n] for n in signature if n in constants}
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert len(compiled.asm["cubin"]) > 1000
    if name == "write_kept":
        return
    values = lrn_gpu.BLOCK // (32 * compiled.metadata.num_warps)  # per thread
    windows = {"across_maps_forward": 5, "across_maps_backward": 9 + 5}.get(name, 25 + 2)
    assert compiled.asm["ptx"].count("ld.global") <= (windows + 1) * values


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("constants", CASES)
@pytest.mark.parametrize("shape", [(8, 96, 55, 55), (8, 256, 27, 27), (3, 12, 5, 7)])
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
def test_masks_on_a_gpu_equal_those_on_a_cpu() -> None:
    source = torch.tensor([2**32 - 5, 77, 2**31 + 3, 9])
    on_gpu = kept_neurons(source.cuda(), 128, 2048, 7, [0, 1], 0.5)
    assert torch.equal(on_gpu.cpu(), kept_neurons(source, 128, 2048, 7, [0, 1], 0.5))

"""The Triton kernels: interpreted on a CPU, compiled for GPUs that need not be there, and run where there is one."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from alexnet_repro.net import lrn_gpu
from alexnet_repro.net.lrn import LocalResponseNorm, SameMapNorm, plain_local_response_norm

triton = pytest.importorskip("triton")
# (size, alpha, beta, k, towers); without towers, the window is within a map
CASES = [
    (5, 1e-4, 0.75, 2.0, 2),
    (9, 0.001 / 9, 0.75, 1.0, 1),
    (3, 0.1, 0.5, 1.0, 2),
    (5, 0.001 / 25, 0.75, 1.0, 0),
    (3, 0.05, 0.6, 1.0, 0),
]
ROUNDING = {torch.float32: 3e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the module with its kernels interpreted on the CPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    spec = importlib.util.spec_from_file_location("interpreted_lrn_gpu", str(lrn_gpu.__file__))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def exact(a: torch.Tensor, db: torch.Tensor, size: int, alpha: float, beta: float, k: float, towers: int) -> tuple:
    """Return value and gradient in float64, from the plain form where there is one."""
    x = a.double().requires_grad_()
    if towers:
        y = plain_local_response_norm(x, size, alpha, beta, k, towers)
    else:
        y = SameMapNorm(size, alpha, beta, k)(x)
    y.backward(db.double())
    return y.detach(), x.grad


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("constants", CASES)
def test_interpreted_kernels_equal_the_plain_form(interpreted: ModuleType, constants: tuple, dtype: torch.dtype) -> None:
    a = (torch.randn(2, 12, 5, 7) * 30).to(dtype).contiguous(memory_format=torch.channels_last)
    db = torch.randn_like(a)
    b, da = torch.empty_like(a), torch.empty_like(a)
    interpreted.forward(a, b, *constants)
    interpreted.backward(a, db, da, *constants)
    for found, expected in zip((b, da), exact(a, db, *constants), strict=True):
        assert relative_error(found, expected) < ROUNDING[dtype]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "name",
    [
        "across_maps_forward",
        "across_maps_backward",
        "within_map_forward",
        "within_map_spread",
        "within_map_backward",
    ],
)
def test_kernels_compile_for_ampere_and_hopper(
    name: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compile to machine code with bfloat16 inputs. A neighbour that several windows share is read once."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(lrn_gpu, name)
    constants = {"SIZE": 5, "BETA": 0.75, "BLOCK": lrn_gpu.BLOCK}
    types = dict.fromkeys(("count", "maps", "height", "width"), "i32") | dict.fromkeys(("alpha", "k"), "fp32")
    types |= dict.fromkeys(constants, "constexpr") | {"direct": "*fp32", "spread": "*fp32"}
    signature = {argument: types.get(argument, "*bf16") for argument in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs={n: constants[n] for n in signature if n in constants})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert len(compiled.asm["cubin"]) > 1000
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
        assert relative_error(found, expected) < ROUNDING[dtype]

"""Compare converted nets with the engines that they come from: onnxruntime, and Caffe's definitions in float64."""

import importlib.util
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from alexnet_repro import features, load_net
from alexnet_repro.errors import UserError
from alexnet_repro.sharing.caffe import read_layers
from alexnet_repro.sharing.conversion import MEAN_PIXEL, from_caffe, from_onnx, read_mean
from tests.conftest import picture

Run = Callable[..., tuple[int, str, str]]
# Shapes of an eighth of the net: maps and neurons of BVLC's AlexNet divided by 8, and 5 classes.
SHAPES = {
    "conv1": (12, 3, 11, 11), "conv2": (32, 6, 5, 5), "conv3": (48, 32, 3, 3), "conv4": (48, 24, 3, 3),
    "conv5": (32, 24, 3, 3), "fc6": (512, 32 * 36), "fc7": (512, 512), "fc8": (5, 512),
}  # fmt: skip


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Return weights and biases whose responses keep their size from layer to layer."""
    rng = np.random.default_rng(seed)
    drawn = {}
    for name, shape in SHAPES.items():
        std = (2 / np.prod(shape[1:])) ** 0.5 * (0.05 if name == "conv1" else 1)
        drawn[f"{name}_w"] = rng.normal(0, std, shape).astype(np.float32)
        drawn[f"{name}_b"] = rng.normal(0, 0.3, shape[0]).astype(np.float32)
    return drawn


def field(number: int, value: bytes | int | float) -> bytes:
    """Return a field of a Protocol Buffers message."""

    def varint(n: int) -> bytes:
        return bytes([n & 0x7F | 0x80]) + varint(n >> 7) if n > 0x7F else bytes([n])

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def caffemodel(own: dict[str, np.ndarray], *, pool_first: bool, old: bool) -> bytes:
    """Return a .caffemodel: the present format, or the one before it, whose arrays have four sizes."""
    number, name, kind, blobs, lrn = (2, 4, 5, 6, 18) if old else (100, 1, 2, 7, 118)
    types = {"Convolution": 4, "InnerProduct": 14, "LRN": 15, "Pooling": 17, "ReLU": 18}

    def blob(array: np.ndarray) -> bytes:
        if old:
            sizes = (1,) * (4 - array.ndim) + array.shape
            shape = b"".join(field(i, size) for i, size in enumerate(sizes, 1))
        else:
            shape = field(7, b"".join(field(1, size) for size in array.shape))
        return field(5, array.astype("<f4").tobytes()) + shape

    def layer(called: str, of: str, arrays: tuple[np.ndarray, ...] = (), extra: bytes = b"") -> bytes:
        content = field(name, called.encode()) + field(kind, types[of] if old else of.encode())
        return field(number, content + b"".join(field(blobs, blob(array)) for array in arrays) + extra)

    constants = field(lrn, field(1, 5) + field(2, 1e-4) + field(3, 0.75))
    parts = [field(1, b"CaffeNet")]
    for called in SHAPES:
        of = "Convolution" if called.startswith("conv") else "InnerProduct"
        parts += [layer(called, of, (own[f"{called}_w"], own[f"{called}_b"])), layer(f"relu{called}", "ReLU")]
        if called in ("conv1", "conv2"):
            pair = [layer("norm", "LRN", extra=constants), layer("pool", "Pooling")]
            parts += pair[::-1] if pool_first else pair
        elif called == "conv5":
            parts.append(layer("pool5", "Pooling"))
    return b"".join(parts)


def caffe_logits(own: dict[str, np.ndarray], bgr: np.ndarray, *, pool_first: bool) -> np.ndarray:
    """Return what Caffe computes in testing for mean-subtracted BGR images (N, 3, 227, 227), in float64."""
    w = {name: torch.from_numpy(value.astype(np.float64)) for name, value in own.items()}

    def norm(x: Tensor) -> Tensor:  # k=1, alpha divided by n, across all maps
        squares = F.pad(x.square(), (0, 0, 0, 0, 2, 2))
        total = sum(squares[:, shift : shift + x.shape[1]] for shift in range(5))
        return x / (1 + 1e-4 / 5 * total) ** 0.75  # type: ignore[operator]

    def pool(x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 2, ceil_mode=True)

    def conv(x: Tensor, name: str, padding: int, groups: int = 1) -> Tensor:
        return F.conv2d(x, w[f"{name}_w"], w[f"{name}_b"], 4 if name == "conv1" else 1, padding, 1, groups).relu()

    x = torch.from_numpy(bgr.astype(np.float64))
    for name, padding, groups in (("conv1", 0, 1), ("conv2", 2, 2)):
        x = conv(x, name, padding, groups)
        x = norm(pool(x)) if pool_first else pool(norm(x))
    x = pool(conv(conv(conv(x, "conv3", 1), "conv4", 1, 2), "conv5", 1, 2)).flatten(1)
    for name in ("fc6", "fc7"):
        x = (x @ w[f"{name}_w"].T + w[f"{name}_b"]).relu()
    return (x @ w["fc8_w"].T + w["fc8_b"]).numpy()


@pytest.mark.parametrize(("pool_first", "old"), [(False, True), (True, False)], ids=["alexnet-old", "caffenet"])
def test_caffe_weights_give_caffes_logits(pool_first: bool, old: bool, tmp_path: Path, run_command: Run) -> None:
    own = weights()
    (tmp_path / "net.caffemodel").write_bytes(caffemodel(own, pool_first=pool_first, old=old))
    mean = np.random.default_rng(1).uniform(90, 130, (3, 256, 256)).astype(np.float32)  # BGR, as Caffe's file
    sizes = b"".join(field(i, size) for i, size in enumerate((1, 3, 256, 256), 1))
    (tmp_path / "mean.binaryproto").write_bytes(sizes + field(5, mean.tobytes()))
    (tmp_path / "classes.txt").write_text("\n".join("abcde"))
    run = tmp_path / "converted"
    options = [f"{key}={tmp_path / name}" for key, name in (("mean", "mean.binaryproto"), ("classes", "classes.txt"))]
    status, out, err = run_command("convert", f"source={tmp_path / 'net.caffemodel'}", f"run={run}", *options)
    assert (status, f"net.pool_first={pool_first}" in out) == (0, True), err
    images = np.stack([picture(i, 256, 256) for i in range(2)])
    bgr = images.transpose(0, 3, 1, 2)[:, ::-1] - mean
    expected = caffe_logits(own, np.ascontiguousarray(bgr[:, :, 14:241, 14:241]), pool_first=pool_first)
    model = load_net(run)
    found = features(model, images, ["fc8"])["fc8"]
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.ptp(expected, 0).max() > 1e-3 * np.abs(expected).max(), "the logits must depend on the images"
    assert model.class_names == list("abcde")


def test_onnx_bvlcalexnet_gives_onnxruntimes_logits(tmp_path: Path, run_command: Run) -> None:
    """The graph is the one that the package onnx ships without weights; both engines get the same weights."""
    import onnx
    import onnxruntime
    from onnx import helper, numpy_helper

    folder = Path(next(iter(importlib.util.find_spec("onnx").submodule_search_locations)))  # type: ignore[union-attr,arg-type]
    shipped = onnx.load(folder / "backend/test/data/light/light_bvlc_alexnet.onnx")
    own = weights(2)
    flat = own["fc6_w"].shape[1]
    constants = [numpy_helper.from_array(value, f"{name}_0") for name, value in own.items()]
    constants.append(numpy_helper.from_array(np.array([1, flat], np.int64), "OC2_DUMMY_1"))
    nodes = [node for node in shipped.graph.node if node.op_type != "ConstantOfShape"]
    logits = helper.make_tensor_value_info("r24", onnx.TensorProto.FLOAT, [1, 5])
    graph = helper.make_graph(nodes, "light", [shipped.graph.input[0]], [logits], constants)
    path = tmp_path / "bvlcalexnet.onnx"
    onnx.save(helper.make_model(graph, opset_imports=shipped.opset_import, ir_version=8), path)
    status, out, err = run_command("convert", f"source={path}", "mean=[120,115,100]", f"run={tmp_path / 'run'}")
    assert (status, "net.floor_pools=['pool1', 'pool2']" in out) == (0, True), err
    image = picture(0, 256, 256)
    inputs = image.transpose(2, 0, 1)[::-1] - np.array([100, 115, 120], np.float32)[:, None, None]  # BGR
    inputs = np.ascontiguousarray(inputs[None, :, 16:240, 16:240])
    (expected,) = onnxruntime.InferenceSession(path).run(["r24"], {"data_0": inputs})
    found = features(load_net(tmp_path / "run"), [image], ["fc8"])["fc8"]
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    changes: list[tuple[str, Callable[[onnx.ModelProto], None]]] = [
        ("Conv 1 has strides", lambda model: model.graph.node[0].attribute[0].ints.__setitem__(0, 2)),
        ("Conv 2 has group 1", lambda model: model.graph.node[4].attribute.pop(0)),
        ("MaxPool 3 has kernel_shape", lambda model: model.graph.node[14].attribute[2].ints.__setitem__(1, 2)),
        ("Gemm 1 has alpha", lambda model: model.graph.node[16].attribute.append(helper.make_attribute("alpha", 2.0))),
        ("it is damaged", lambda model: model.graph.initializer[0].ClearField("raw_data")),
        ("fc6.bias has shape", lambda model: model.graph.initializer[11].dims.append(1)),
    ]
    for problem, change in changes:
        changed = onnx.load(path)
        change(changed)
        (tmp_path / "changed.onnx").write_bytes(changed.SerializeToString())
        with pytest.raises(UserError, match=problem):
            from_onnx(tmp_path / "changed.onnx")


def test_an_exported_graph_is_not_converted(small_alexnet: Path, tmp_path: Path, run_command: Run) -> None:
    """It has the layers of AlexNet, but its images are RGB and its dropout is scaled inside."""
    path = tmp_path / "own.onnx"
    assert run_command("export", f"run={small_alexnet}", "format=onnx", f"out={path}", "at_chance=true")[0] == 0
    status, _, err = run_command("convert", f"source={path}", f"run={tmp_path / 'run'}")
    assert (status, "is not BVLC's AlexNet or CaffeNet" in err) == (2, True)


def test_evaluate_takes_a_converted_net(small_store: Path, tmp_path: Path, run_command: Run) -> None:
    own = weights()
    own |= {"fc8_w": own["fc8_w"][:2], "fc8_b": own["fc8_b"][:2]}
    (tmp_path / "net.caffemodel").write_bytes(caffemodel(own, pool_first=False, old=False))
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    run = tmp_path / "run"
    names = [f"source={tmp_path / 'net.caffemodel'}", f"classes={tmp_path / 'classes.txt'}", f"store={small_store}"]
    assert run_command("convert", *names, f"run={run}")[0] == 0
    status, out, err = run_command("evaluate", f"run={run}", "trainer=cpu")
    assert (status, "top-1" in out) == (0, True), err
    (tmp_path / "again.tmp").mkdir()
    (tmp_path / "again.tmp" / "mine").touch()
    assert run_command("convert", *names, f"run={tmp_path / 'again'}")[0] == 0
    assert (tmp_path / "again.tmp" / "mine").exists(), "convert must leave other folders alone"
    assert not list(tmp_path.glob("again.?*[!p]"))
    status, out, err = run_command("export", f"run={run}", f"out={tmp_path / 'shared'}", "format=hub")
    assert status == 0, err
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "converted by `alexnet_repro`" in card
    assert "| seed |" not in card


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "other net"])
def test_files_that_are_not_such_a_net_are_refused(damage: str, tmp_path: Path, run_command: Run) -> None:
    content = caffemodel(weights(), pool_first=False, old=False)
    damaged = {
        "cut": content[: len(content) // 2],
        "text": b"name: 'CaffeNet'\nlayer { name: 'conv1' }\n",
        "empty": b"",
        "other net": content.replace(b"conv3", b"incep"),
    }[damage]
    (tmp_path / "net.caffemodel").write_bytes(damaged)
    status, _, err = run_command("convert", f"source={tmp_path / 'net.caffemodel'}", f"run={tmp_path / 'run'}")
    assert (status, err.startswith("error: ")) == (2, True), err
    assert len(err.splitlines()) <= 3
    assert not (tmp_path / "run").exists()


def test_every_cut_of_a_file_is_an_error_and_not_a_traceback(tmp_path: Path) -> None:
    own = {name: value[:1] for name, value in weights().items()}
    content = caffemodel(own, pool_first=False, old=False)
    path = tmp_path / "net.caffemodel"
    rng = np.random.default_rng(0)
    for end in rng.integers(0, len(content), 200):
        path.write_bytes(content[:end])
        with suppress(UserError):
            assert len(read_layers(path)) < 16
    for place in rng.integers(0, len(content), 500):  # other keys, types and sizes
        damaged = bytearray(content)
        damaged[place] = rng.integers(0, 256)
        path.write_bytes(damaged)
        with suppress(UserError):
            from_caffe(path)
    for wrong in ("conv1_w", "fc6_b"):
        other = own | {wrong: own[wrong].ravel() if wrong == "conv1_w" else np.zeros(0, np.float32)}
        path.write_bytes(caffemodel(other, pool_first=False, old=False))
        with pytest.raises(UserError, match=r"has shape|without numbers|damaged"):
            from_caffe(path)


def test_torchvisions_weights_are_refused_with_the_reason(tmp_path: Path, run_command: Run) -> None:
    from torchvision.models import alexnet

    with torch.device("meta"):
        names = alexnet().state_dict()
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / "alexnet.pth")
    status, _, err = run_command("convert", f"source={tmp_path / 'alexnet.pth'}", f"run={tmp_path / 'run'}")
    assert status == 2
    assert "torchvision's alexnet, another net: one tower" in err


def test_mean_images_are_read_in_the_order_of_their_shape(tmp_path: Path) -> None:
    """Caffe's ilsvrc_2012_mean.npy is (3, 256, 256), BGR."""
    rgb = np.random.default_rng(0).uniform(-4, 4, (256, 256, 3)) + MEAN_PIXEL
    np.save(tmp_path / "caffe.npy", rgb.transpose(2, 0, 1)[::-1])
    np.save(tmp_path / "rgb.npy", rgb)
    for name in ("caffe.npy", "rgb.npy"):
        np.testing.assert_allclose(read_mean(tmp_path / name), rgb, rtol=1e-6)
    np.save(tmp_path / "caffe.npy", rgb.transpose(2, 0, 1))
    np.save(tmp_path / "rgb.npy", rgb[..., ::-1])
    for name, order in (("caffe.npy", "BGR"), ("rgb.npy", "RGB")):
        with pytest.raises(UserError, match=rf"more blue \(12.\) than red \(104\), read as {order}"):
            read_mean(tmp_path / name)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000, 3, 256)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (" + "(" * 90 + ")" * 90 + ")}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (3,)}",
        "{" + "'a': 1, " * 3000 + "}",
        "not a mapping",
    ],
)
def test_mean_files_with_hostile_headers_are_refused(header: str, tmp_path: Path) -> None:
    head = header.encode()
    (tmp_path / "m.npy").write_bytes(b"\x93NUMPY\x02\x00" + struct.pack("<I", len(head) + 1) + head + b"\n" + bytes(64))
    with pytest.raises(UserError, match=r"is not a (\.npy of numbers|mean image)"):
        read_mean(tmp_path / "m.npy")

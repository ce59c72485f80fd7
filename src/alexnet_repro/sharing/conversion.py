"""Make a run of weights that Caffe or ONNX distributes, so that ``evaluate``, ``features`` and ``export`` take them."""

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf

from alexnet_repro.data.store import sha256
from alexnet_repro.errors import UserError, needed
from alexnet_repro.files import written_whole
from alexnet_repro.sharing import caffe
from alexnet_repro.sharing.nets import layers_with_weights, refusal
from alexnet_repro.training.checkpoints import FORMAT
from alexnet_repro.training.classifier import Classifier

MEAN_PIXEL = (122.67891434, 116.66876762, 104.00698793)  # RGB, the mean of Caffe's mean image of ILSVRC-2012
LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
CAFFES = "convert the .caffemodel instead"
ONNX_DEFAULTS: dict[str, Any] = {  # of the attributes of ONNX's Conv, MaxPool and Gemm
    "strides": [1, 1], "pads": [0] * 4, "dilations": [1, 1], "group": 1, "auto_pad": b"NOTSET", "ceil_mode": 0,
    "storage_order": 0, "alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0,
}  # fmt: skip
ONNX_LAYERS: dict[str, list[dict[str, Any]]] = {  # attributes in ONNX's bvlcalexnet
    "Conv": [
        {"kernel_shape": [size] * 2, "strides": [stride] * 2, "pads": [pad] * 4, "group": group}
        for size, stride, pad, group in ((11, 4, 0, 1), (5, 1, 2, 2), (3, 1, 1, 1), (3, 1, 1, 2), (3, 1, 1, 2))
    ],
    "MaxPool": [{"kernel_shape": [3, 3], "strides": [2, 2], "pads": pads} for pads in ([0] * 4, [0] * 4, [0, 0, 1, 1])],
    "Gemm": [{"transB": 1}] * 3,
}
UNREADABLE = (
    ValueError,
    EOFError,
    TypeError,
    SyntaxError,
    TokenError,
    OverflowError,
    MemoryError,
    RecursionError,
)  # .npy
STORED = 256  # side length of ImageNet's images in a store, in pixels
EMPTY: dict[str, Any] = {  # options of training, which a converted net does not use
    "optim": {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.0005, "bias_rate": 2.0, "bias_decay": False},
    "schedule": {"rule": "constant", "by_hand": {"of_epochs": 1, "changes": {}, "val_joins_after": None}},
    "epochs": 1,
}


@dataclass(frozen=True)
class Weights:
    """What a file holds: {layer.weight, layer.bias: array}, with RGB inputs, and the options of the net."""

    arrays: dict[str, NDArray[np.float32]]
    net: dict[str, Any]


def convert(cfg: DictConfig) -> dict[str, Any]:
    """Write the weights of ``cfg.source`` as the run ``cfg.run``: config.yaml and checkpoints/last.ckpt.

    source: a .caffemodel of BVLC's AlexNet or CaffeNet, or ONNX's bvlcalexnet. mean: Caffe's mean image (.binaryproto),
    a .npy of shape (256, 256, 3), RGB, or (3, 256, 256), BGR as Caffe's, or the mean of each colour. classes: a text file with the name
    of a class in each line, in the order of the outputs.

    Each respect in which these nets differ from the paper's becomes a switch of the net: normalisation with k=1 across
    both towers, and pooling first in CaffeNet. Caffe scales the neurons that dropout keeps; here they are scaled at test
    time instead, so that the weights that read them are doubled. The channels of conv1 are reversed where the file has
    them in the order BGR.

    Returns the folder. Raises UserError for other nets and unusable options.
    """
    if cfg.source is None or cfg.run is None:
        raise UserError(
            "source and run are needed",
            "for example source=bvlc_alexnet.caffemodel mean=imagenet_mean.binaryproto run=runs/bvlc_alexnet",
        )
    source, run = Path(str(cfg.source)), Path(str(cfg.run))
    mean = read_mean(cfg.mean)
    if not source.is_file():
        raise UserError(f"there is no file {source}")
    if run.exists():
        raise UserError(f"{run} exists", "choose another folder with run=PATH")
    readers = {".caffemodel": from_caffe, ".onnx": from_onnx}
    if source.suffix not in readers:
        raise UserError(f"source={source}: the name must end with {' or '.join(readers)}", _about_torch(source) or "")
    weights = readers[source.suffix](source)
    classes = len(weights.arrays["fc8.bias"])
    names = _class_names(cfg.classes, classes)
    crop = weights.net["image_size"]
    hyper = {
        "net": {"name": "alexnet", "classes": classes, **weights.net},
        **EMPTY,
        "augment": {
            "crop": crop, "random_crops": False, "mirror": False, "share": 1, "mean": "patch", "colour_noise": 0.0,
            "colour_unit": "eigenvalue", "colour_divisor": 1.0, "colour_noise_epochs": None, "jitter": 0.0,
        },
        "image_size": STORED,
        "class_names": names,
        "seed": 0,
    }  # fmt: skip
    try:
        model = Classifier(**hyper, mean=mean)
    except ValueError as error:
        raise UserError(f"{source} does not have the layers of BVLC's AlexNet or CaffeNet: {error}") from None
    _load(model, weights.arrays, source)
    config = {
        "recipe": "converted",
        "converted": f"{source.name}, sha256 {sha256(source)}",
        "seed": 0,
        "claim": None,
        "ablation": {},
        "net": hyper["net"],
        "data": {"name": "ilsvrc2012", "store": str(cfg.store)},
        "batch_size": 128,
    }
    run.parent.mkdir(parents=True, exist_ok=True)
    # a failure leaves no half of a run
    with tempfile.TemporaryDirectory(prefix=f"{run.name}.", dir=run.parent) as folder:
        unfinished = Path(folder) / "run"
        (unfinished / "checkpoints").mkdir(parents=True)
        with written_whole(unfinished / "checkpoints" / "last.ckpt") as file:
            content = {"state_dict": model.state_dict(), "hyper_parameters": hyper, "global_step": 0, "epoch": 0}
            content |= {"alexnet_repro": {"format": FORMAT}, "history": [], "pytorch-lightning_version": "2.6.0"}
            content |= {"training_means": torch.zeros(1, 3)}
            torch.save(content, file)
        with written_whole(unfinished / "config.yaml") as file:
            file.write(OmegaConf.to_yaml(OmegaConf.create(config)).encode())
        unfinished.rename(run)
    switches = ", ".join(f"net.{key}={value}" for key, value in weights.net.items())
    print(f"written to {run}: {classes} classes, {switches}")
    return {"run": str(run), "net": hyper["net"]}


def from_caffe(path: Path) -> Weights:
    """Read BVLC's AlexNet or CaffeNet. The order of pooling and normalisation is that of the layers in the file."""
    layers = caffe.read_layers(path)
    arrays = {}
    for name in LAYERS:
        own = next((layer for layer in layers if layer.name == name and len(layer.blobs) == 2), None)
        if own is None:
            have = ", ".join(layer.name for layer in layers if layer.blobs)
            raise UserError(f"{path} has no layer {name}: this is for BVLC's AlexNet and CaffeNet", f"it has: {have}")
        arrays[f"{name}.weight"], arrays[f"{name}.bias"] = own.blobs[0], own.blobs[1].ravel()
        if name.startswith("fc"):  # the format before the present one has two more dimensions
            outer, inner = own.blobs[0].shape[:-2], own.blobs[0].shape[-2:]
            arrays[f"{name}.weight"] = own.blobs[0].reshape([size for size in outer if size != 1] + list(inner))
    norms = [layer for layer in layers if layer.kind == "LRN"]
    kinds = [layer.kind for layer in layers if layer.kind in ("LRN", "Pooling")]
    if len(norms) != 2 or norms[0].lrn != norms[1].lrn or norms[0].lrn["within"] or len(kinds) != 5:
        raise UserError(f"{path} does not have two equal normalisations across maps and three pooling layers")
    return _as_ours(path, arrays, norms[0].lrn, {"pool_first": kinds[0] == "Pooling", "image_size": 227})


def from_onnx(path: Path) -> Weights:
    """Read ONNX's bvlcalexnet: 54 positions in conv1, and pool1 and pool2 without an incomplete last window."""
    needed("onnx", "an .onnx file")
    import onnx
    from google.protobuf.message import DecodeError
    from onnx import helper, numpy_helper

    try:
        graph = onnx.load(path).graph
        own = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    except (DecodeError, ValueError, TypeError, OSError, onnx.checker.ValidationError) as error:
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not an ONNX file, or it is damaged: {problem}") from None
    kinds = [node.op_type for node in graph.node if node.op_type in ("Conv", "LRN", "MaxPool", "Gemm")]
    silent = {"Relu", "Reshape", "Flatten", "Dropout", "Softmax"}
    others = [node.op_type for node in graph.node if node.op_type not in {*kinds, *silent}]
    normal = ["Conv", "LRN", "MaxPool", "Conv", "LRN", "MaxPool", "Conv", "Conv", "Conv", "MaxPool", *["Gemm"] * 3]
    pooled_first = ["Conv", "MaxPool", "LRN", "Conv", "MaxPool", "LRN", *normal[6:]]
    if kinds not in (normal, pooled_first) or others:
        raise UserError(
            f"{path} is not BVLC's AlexNet or CaffeNet", f"its layers are {', '.join(kinds + others) or 'none'}"
        )
    sides = [side.dim_value for side in graph.input[0].type.tensor_type.shape.dim[2:]] if graph.input else []
    if sides != [224, 224]:
        raise UserError(f"{path}: images are {sides}, not [224, 224] as in ONNX's bvlcalexnet", CAFFES)
    attributes: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for node in graph.node:
        if node.op_type in attributes:
            attributes[node.op_type].append({a.name: helper.get_attribute_value(a) for a in node.attribute})
    for kind, expected in ONNX_LAYERS.items():
        for number, (given, wanted) in enumerate(zip(attributes[kind], expected, strict=True), 1):
            fitting = ONNX_DEFAULTS | wanted
            found = ONNX_DEFAULTS | {"kernel_shape": wanted.get("kernel_shape")} | given  # it follows from the weights
            if wrong := next((key for key in found if found[key] != fitting.get(key)), None):
                raise UserError(
                    f"{path}: {kind} {number} has {wrong} {found[wrong]}, not {fitting.get(wrong)} as in bvlcalexnet",
                    CAFFES,
                )
    arrays = {}
    for name, node in zip(LAYERS, (n for n in graph.node if n.op_type in ("Conv", "Gemm")), strict=True):
        if missing := [end for end in node.input[1:3] if end not in own]:
            raise UserError(f"{path} has no weights for {name}: {missing[0]} is computed or missing")
        arrays[f"{name}.weight"], arrays[f"{name}.bias"] = own[node.input[1]], own[node.input[2]]
    norms = attributes["LRN"]
    if norms[0] != norms[1]:
        raise UserError(f"{path} does not have two equal normalisations")
    usual = {"alpha": 1e-4, "beta": 0.75, "bias": 1.0} | norms[0]
    lrn = {"n": usual["size"], "alpha": usual["alpha"], "beta": usual["beta"], "k": usual["bias"]}
    options = {"pool_first": kinds == pooled_first, "floor_pools": ["pool1", "pool2"], "image_size": 223}
    return _as_ours(path, arrays, lrn, options)


def _as_ours(
    path: Path, arrays: dict[str, NDArray[np.float32]], lrn: dict[str, float], options: dict[str, Any]
) -> Weights:
    for name, array in arrays.items():
        if array.ndim != (1 if name.endswith("bias") else 4 if name.startswith("conv") else 2) or not array.size:
            raise UserError(f"{path}: {name} has shape {array.shape}")
    if lrn["n"] < 1 or not all(math.isfinite(value) for value in lrn.values()):
        raise UserError(f"{path}: its normalisation has n={lrn['n']}, alpha={lrn['alpha']}, beta={lrn['beta']}")
    arrays["conv1.weight"] = arrays["conv1.weight"][:, ::-1]  # its images are BGR, also those of ONNX's bvlcalexnet
    for name in ("fc7.weight", "fc8.weight"):  # they read neurons that are halved here at test time (Section 4.2)
        arrays[name] = 2 * arrays[name]
    n = int(lrn["n"])
    net = {
        "lrn_n": n,
        "lrn_k": round(float(lrn["k"]), 7),
        "lrn_alpha": float(f"{lrn['alpha'] / n:.6g}"),  # Caffe and ONNX divide it by n
        "lrn_beta": round(float(lrn["beta"]), 7),
        "lrn_across_towers": True,
        **options,
    }
    if (width := len(arrays["conv1.bias"]) / 96) != 1:
        net["width"] = width
    return Weights(arrays, net)


def _load(model: Classifier, arrays: dict[str, NDArray[np.float32]], source: Path) -> None:
    own = model.net.state_dict()
    for name in (f"{layer}.{kind}" for layer in layers_with_weights(model.net) for kind in ("weight", "bias")):
        if arrays[name].shape != tuple(own[name].shape):
            raise UserError(f"{source}: {name} has shape {arrays[name].shape}, not {tuple(own[name].shape)}")
        own[name] = torch.tensor(np.ascontiguousarray(arrays[name], np.float32))
        if not own[name].isfinite().all():
            raise UserError(f"{source}: {name} holds numbers that are not finite")
    model.net.load_state_dict(own)


def read_mean(option: Any) -> NDArray[np.float32]:
    """Return the mean image (256, 256, 3), RGB: from a file, or one with the same colour everywhere.

    A .npy of shape (3, 256, 256) is in Caffe's order, BGR, as its ilsvrc_2012_mean.npy, and one of shape (256, 256, 3)
    is RGB.

    Raises UserError if the file is not such an image, or if its brightest colour says that it has the other order: ImageNet's
    mean has more red than blue.
    """
    shape = (STORED, STORED, 3)
    if option is None or OmegaConf.is_list(option):
        pixel = MEAN_PIXEL if option is None else tuple(option)
        if len(pixel) != 3 or not all(isinstance(value, int | float) and 0 <= value <= 255 for value in pixel):
            raise UserError(f"mean={option}: this must be three numbers from 0 to 255, [R,G,B]")
        return np.full(shape, pixel, np.float32)
    path = Path(str(option))
    if not path.is_file():
        raise UserError(f"there is no file mean={path}", "name Caffe's .binaryproto, a .npy, or [R,G,B]")
    if path.suffix == ".npy":
        try:
            mean = np.load(path, mmap_mode="r")  # its header may announce any size
            if not isinstance(mean, np.ndarray) or mean.dtype.kind not in "fiu":
                raise ValueError("it does not hold one array of numbers")
        except UNREADABLE as error:
            raise UserError(f"mean={path} is not a .npy of numbers: {' '.join(str(error).split())[:200]}") from None
    else:
        mean = caffe.read_mean(path)
        mean = mean[0] if mean.ndim == 4 and len(mean) == 1 else mean
    order = "RGB"
    if mean.shape == (3, STORED, STORED):
        mean, order = mean[::-1].transpose(1, 2, 0), "BGR"
    if mean.shape != shape or not ((mean >= 0) & (mean <= 255)).all():
        raise UserError(f"mean={path} is not a mean image: it has shape {mean.shape}, or values outside 0 to 255")
    red, _, blue = mean.astype(np.float64).mean((0, 1))
    if path.suffix == ".npy" and red < blue:
        raise UserError(
            f"mean={path} has more blue ({blue:.0f}) than red ({red:.0f}), read as {order}: ImageNet's mean has more red",
            "give the colours as (3, 256, 256) BGR, as (256, 256, 3) RGB, or as [R,G,B]",
        )
    return np.ascontiguousarray(mean, np.float32)


def _class_names(option: Any, count: int) -> list[str]:
    if option is None:
        return [str(i) for i in range(count)]
    path = Path(str(option))
    if not path.is_file():
        raise UserError(f"there is no file classes={path}")
    try:
        names = path.read_text().splitlines()
    except UnicodeDecodeError:
        raise UserError(f"classes={path} is not a text file") from None
    if len(names) != count or len(set(names)) != count:
        raise UserError(f"classes={path} has {len(set(names))} different names, and the net has {count} outputs")
    return names


def _about_torch(source: Path) -> str:
    """Say why a file of PyTorch is refused."""
    if source.suffix not in (".pt", ".pth", ".bin"):
        return ""
    try:
        content = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # whatever it is, it is refused
        return ""
    return refusal(set(content)) if isinstance(content, dict) else ""

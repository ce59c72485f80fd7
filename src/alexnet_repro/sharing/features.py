"""Outputs of a trained net's layers for any images."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from alexnet_repro.data.archives import walk
from alexnet_repro.data.augment import centre_crop
from alexnet_repro.data.batches import ValBatch
from alexnet_repro.data.images import central_square, image_suffixes, read_image, to_rgb
from alexnet_repro.data.jpeg import RGB
from alexnet_repro.data.listing import Account, junk
from alexnet_repro.data.split import Split
from alexnet_repro.data.store import Store
from alexnet_repro.errors import UserError, printable
from alexnet_repro.net.alexnet import AlexNet
from alexnet_repro.processes import cores
from alexnet_repro.sharing.nets import load_net
from alexnet_repro.training.classifier import Classifier

UNREADABLE = (OSError, ValueError, TypeError)  # what read_image and Pillow raise for what is not an image


def features(
    net: Classifier | str | Path,
    images: Any,
    layers: Sequence[str] = ("fc7",),
    *,
    per_tower: bool = False,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    at_chance: bool = False,
) -> dict[str, NDArray[np.float32]]:
    """Return the outputs of layers for images, {layer: (N, ...)} float32, in the order of the images.

    net: the folder of a run, a .ckpt or .safetensors file, or what ``load_net`` returned.
    images: a folder, a path, a list of paths, of PIL images or of (height, width, 3) uint8 arrays; an array or tensor of
        N uint8 images, (N, height, width, 3) or (N, 3, height, width), RGB; a Store (its measured split) or a Split; or
        a float tensor (N, 3, crop, crop) that ``preprocess`` made.
    layers: names out of ``net.net.layer_names``, such as conv5.linear (before the activation function), conv5, pool5,
        fc6, fc7 (before dropout) and fc8 (the logits).
    per_tower: whether to return (N, towers, maps or neurons of a tower, ...) instead.
    device: where to compute; None: on a GPU if there is one.
    at_chance: as for ``load_net``.

    The result is held in memory; the command ``python -m alexnet_repro.features`` writes to a file as it goes. Raises
    UserError for a layer that the net doesn't have, for an image that cannot be read, and as ``load_net`` does.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}: this must be at least 1")
    layers = [layers] if isinstance(layers, str) else list(layers)
    model = net if isinstance(net, Classifier) else load_net(net, at_chance=at_chance)
    found: dict[str, NDArray[np.float32]] = {}
    inputs = Inputs(images, model)
    for first, part, unreadable in outputs(model, inputs, layers, per_tower, batch_size, device):
        if unreadable:
            index, reason = unreadable[0]
            raise UserError(f"{inputs.names[index]} is not a readable image: {reason}")
        for name, values in part.items():
            whole = found.setdefault(name, np.empty((len(inputs.names), *values.shape[1:]), np.float32))
            whole[first : first + len(values)] = values
    return found


def preprocess(image: Any, net: Classifier) -> Tensor:
    """Return what the net expects of an image: (3, crop, crop) float32 with the mean image subtracted.

    The shorter side is scaled to the size of the training images (256 in the paper), and the central square is cut out.
    The mean image, on the 0-255 scale, is subtracted, and the central patch (224x224) is cut. There is no division.

    image: a path, a PIL image, or a (height, width, 3) uint8 array. Raises UserError if it cannot be read.
    """
    inputs = Inputs([image], net)
    try:
        square = torch.from_numpy(np.array(inputs.square(0)))
    except UNREADABLE as error:
        raise UserError(f"{inputs.names[0]} is not a readable image: {error}") from None
    return _patches(square[None], net)[0].contiguous()


class Inputs:
    """Images in any form, by index.

    names: of the N images. ``square(i)`` is image i as (size, size, 3) uint8, where size is that of the images on which
    the net was trained. tensor: the inputs themselves instead, where they are preprocessed already. files: the images'
    files, where they are those of one path.

    Raises UserError if the images have another form than ``features`` names, or if there are none.
    """

    def __init__(self, images: Any, model: Classifier) -> None:
        self.size = model.image_size
        self.files: list[Path] = []
        self.tensor: Tensor | None = None
        self.square: Callable[[int], RGB]
        if isinstance(images, np.ndarray) and images.dtype.kind in "USO":  # names, or an array of objects
            images = list(images.ravel())
        if (
            isinstance(images, list | tuple)
            and images
            and all(isinstance(im, Tensor) and im.is_floating_point() for im in images)
        ):
            images = torch.stack(list(images))  # each from preprocess
        if isinstance(images, str | os.PathLike) and (Path(images) / "manifest.json").is_file():
            images = Store(Path(images))
        if isinstance(images, Store):
            images = images.split(images.measured_split)
        if isinstance(images, Split):
            if images.image_size != self.size:
                raise UserError(
                    f"the images of {images.path} have {images.image_size} pixels, the net's have {self.size}",
                    "name a folder of images, which are scaled as needed",
                )
            self.square = images.__getitem__
            self.names = [f"{images.path.name}/{i}" for i in range(len(images))]
        elif isinstance(images, np.ndarray | Tensor):
            if isinstance(images, np.ndarray):
                usable = images.flags.writeable and min(images.strides, default=0) >= 0
                images = torch.from_numpy(images if usable else np.array(images))
            self._take_array(images, model.crop)
        else:
            self._take_list(images)
        if not self.names:
            raise UserError("there are no images", "name at least one")
        self.names = [printable(name) for name in self.names]

    def _take_array(self, images: Tensor, crop: int) -> None:
        self.names = [str(i) for i in range(len(images) if images.ndim else 0)]
        if images.is_floating_point() and images.ndim == 4 and images.shape[1:] == (3, crop, crop):
            self.tensor = images
        elif images.dtype == torch.uint8 and images.ndim == 4 and 3 in (images.shape[1], images.shape[3]):
            rgb = (images if images.shape[3] == 3 else images.permute(0, 2, 3, 1)).cpu().numpy()
            self.square = lambda i: central_square(Image.fromarray(rgb[i]), self.size)
        else:
            raise UserError(
                f"images of shape {tuple(images.shape)} and type {str(images.dtype).removeprefix('torch.')} are not usable",
                f"give uint8 RGB, (N, height, width, 3) or (N, 3, height, width), or float (N, 3, {crop}, {crop}) from preprocess",
            )

    def _take_list(self, images: Any) -> None:
        if isinstance(images, str | os.PathLike):
            root = Path(images)
            images = self.files = [root] if root.is_file() else image_files(root)
            self.names = [path.name if path == root else path.relative_to(root).as_posix() for path in self.files]
        elif isinstance(images, Sequence):
            self.names = [os.fspath(im) if isinstance(im, str | os.PathLike) else str(i) for i, im in enumerate(images)]
        else:
            raise UserError(f"images of type {type(images).__name__} are not usable", "give a list, an array or a path")

        def square(index: int) -> RGB:
            image = images[index]
            if isinstance(image, str | os.PathLike):
                return read_image(Path(image).read_bytes, self.size)
            if not isinstance(image, Image.Image):
                pixels = np.asarray(image)
                if pixels.dtype != np.uint8:
                    raise TypeError(f"it has numbers of type {pixels.dtype}, not uint8")
                image = Image.fromarray(np.ascontiguousarray(pixels))
            return central_square(to_rgb(image), self.size)

        self.square = square


def image_files(folder: Path) -> list[Path]:
    """Return the image files in a folder and its subfolders, by their names, in the order of their paths.

    The thumbnails of file servers and hidden files are left out, as in ``prepare``. Says how many files are left out.

    Raises UserError if there are none, and OSError for a folder that cannot be read.
    """
    again = "name a folder with files named .jpg, .jpeg, .png ..., or a store"
    if not folder.is_dir():
        raise UserError(f"there is nothing at {folder}", again)
    account, files = Account(), []
    for parent, subfolders, names in walk(folder):
        for name in (*subfolders, *names):
            is_folder = name in subfolders
            account.seen += not is_folder or bool(junk(name))
            if reason := junk(name):
                account.leave_out(reason, name)
            elif is_folder:
                continue
            elif (parent / name).suffix.lower() not in image_suffixes():
                account.leave_out("files that are not named as images", name)
            elif not (parent / name).is_file():
                account.leave_out("names that lead to no file", name)
            else:
                files.append(parent / name)
        subfolders[:] = [name for name in subfolders if not junk(name)]
    account.settle(len(files))
    if not files:
        raise UserError(f"there are no images in {folder}", "; ".join([again, *account.lines()]))
    for line in account.lines():
        print(f"left out: {line}")
    return sorted(files)


def outputs(
    model: Classifier,
    inputs: Inputs,
    layers: Sequence[str],
    per_tower: bool,
    batch_size: int,
    device: str | torch.device | None = None,
    start: int = 0,
) -> Iterator[tuple[int, dict[str, NDArray[np.float32]], list[tuple[int, str]]]]:
    """Yield, for one batch after the other: the index of its first image, {layer: outputs}, and the unreadable images.

    An unreadable image is an (index, reason), and its outputs are NaN. Images are decoded in threads, one batch ahead.
    start: the first image. The other arguments and the errors are those of ``features``.
    """
    net = checked(model, layers, per_tower)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else next(model.parameters()).device
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # unknown, or not there
        problem = str(error).splitlines()[0]
        raise UserError(
            f"device={device} cannot be used here: {problem[:100]}", "leave it out, or choose cpu"
        ) from None
    model.to(device).eval()
    with (
        ThreadPoolExecutor(min(cores(), 16)) as threads,
        torch.inference_mode(),
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
    ):
        for first, batch, unreadable in _batches(inputs, batch_size, threads, start):
            images = batch.to(device, non_blocking=True)
            if images.dtype == torch.uint8:
                images = _patches(images, model)
            seen = net.activations(images.contiguous(memory_format=torch.channels_last), layers)
            part = {}
            for name in layers:
                values = seen[name].float().cpu().contiguous().numpy()
                if per_tower:
                    values = values.reshape(len(values), net.towers, -1, *values.shape[2:])
                for index, _ in unreadable:
                    values[index - first] = np.nan
                part[name] = values
            yield first, part, unreadable


def checked(model: Classifier, layers: Sequence[str], per_tower: bool) -> AlexNet:
    """Return the net. Raise UserError if it isn't AlexNet, has no such layer, or has no towers in one."""
    net = model.net
    if not isinstance(net, AlexNet):
        raise UserError("features are those of net=alexnet", f"this net is {model.hparams['net']['name']}")
    if not layers:
        raise UserError("no layers are named", f"the net has: {', '.join(net.layer_names)}")
    for name in layers:
        if name not in net.layer_names:
            raise UserError(f"the net has no layer {name}", f"it has: {', '.join(net.layer_names)}")
        if per_tower and (net.towers == 1 or name == "fc8"):
            raise UserError(f"{name} has no towers", "leave out per_tower")
    return net


def _patches(squares: Tensor, model: Classifier) -> Tensor:
    """Return the preprocessed patches (N, 3, crop, crop) of uint8 squares (N, size, size, 3)."""
    return model.views(ValBatch(squares, torch.empty(0)), centre_crop)


def _batches(
    inputs: Inputs, batch_size: int, threads: ThreadPoolExecutor, start: int
) -> Iterator[tuple[int, Tensor, list[tuple[int, str]]]]:
    count = len(inputs.names)
    firsts = range(start, count, batch_size)
    if inputs.tensor is not None:
        for first in firsts:
            yield first, inputs.tensor[first : first + batch_size].float(), []
        return

    def decoded(index: int) -> RGB | str:
        try:
            return inputs.square(index)
        except UNREADABLE as error:
            return printable(" ".join(str(error).split())) or type(error).__name__

    def begun(first: int) -> list[Any]:
        return [threads.submit(decoded, i) for i in range(first, min(first + batch_size, count))]

    ahead = begun(start)
    for first in firsts:
        squares, unreadable = [], []
        waiting, ahead = ahead, begun(first + batch_size)
        for index, future in enumerate(waiting, first):
            square = future.result()
            if isinstance(square, str):
                unreadable.append((index, square))
                square = np.zeros((inputs.size, inputs.size, 3), np.uint8)
            squares.append(torch.from_numpy(np.array(square)))
        yield first, torch.stack(squares), unreadable

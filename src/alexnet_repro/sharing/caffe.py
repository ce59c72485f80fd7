"""Read a .caffemodel or a .binaryproto file of Caffe, without Caffe.

Both are Protocol Buffers in binary form. A message is a sequence of fields: a key (number of the field << 3 | type), and
a value, whose form follows from the type. The field numbers are those of Caffe's caffe.proto.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from alexnet_repro.errors import UserError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
# Numbers of the fields of NetParameter that hold layers, and of the fields of a layer, in the present format (V2) and in
# the one before it (V1).
LAYERS = {100: {"name": 1, "type": 2, "blobs": 7, "lrn": 118}, 2: {"name": 4, "type": 5, "blobs": 6, "lrn": 18}}
V1_TYPES = {4: "Convolution", 14: "InnerProduct", 15: "LRN", 17: "Pooling"}
Value = int | memoryview


@dataclass(frozen=True)
class Layer:
    """A layer of a Caffe net. blobs: weight and bias, if it has them. lrn: its constants, if it is of type LRN."""

    name: str
    kind: str
    blobs: list[NDArray[np.float32]]
    lrn: dict[str, float]


def read_layers(path: Path) -> list[Layer]:
    """Return the layers of a .caffemodel, in their order. Raises UserError if the file is not one."""
    try:
        found = [_layer(memoryview(value), LAYERS[number]) for number, value in fields(path.read_bytes()) if number in LAYERS and isinstance(value, memoryview)]  # fmt: skip
    except (ValueError, IndexError, OverflowError) as error:
        raise UserError(f"{path} is not a .caffemodel, or it is damaged: {error}") from None
    if not any(layer.blobs for layer in found):
        raise UserError(
            f"{path} has no weights", "name the .caffemodel, and not the .prototxt, which describes the net alone"
        )
    return found


def read_mean(path: Path) -> NDArray[np.float32]:
    """Return the array of a .binaryproto, such as a mean image (1, 3, 256, 256). Raises UserError if it is not one."""
    try:
        return _blob(memoryview(path.read_bytes()))
    except (ValueError, IndexError, OverflowError) as error:
        raise UserError(f"{path} is not a .binaryproto of Caffe: {error}") from None


def fields(message: bytes | memoryview) -> Iterator[tuple[int, Value]]:
    """Yield (number, value) for each field of a message. Raises ValueError if it is not one."""
    message, place = memoryview(message), 0
    while place < len(message):
        key, place = _varint(message, place)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, place = _varint(message, place)
            yield number, value
            continue
        if kind == BYTES:
            size, place = _varint(message, place)
        elif kind in (FIXED32, FIXED64):
            size = 4 if kind == FIXED32 else 8
        else:
            raise ValueError(f"a field of type {kind} at byte {place}")
        if place + size > len(message):
            raise ValueError(f"it ends within a field, at byte {len(message)}")
        yield number, message[place : place + size]
        place += size


def _inner(value: Value) -> memoryview:
    """Return a value that must be a message or text."""
    if isinstance(value, int):
        raise ValueError(f"the number {value} where a message belongs")
    return value


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if place >= len(message) or shift > 63:
            raise ValueError(f"no number at byte {place}")
        byte = message[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place


def _layer(message: memoryview, numbers: dict[str, int]) -> Layer:
    name, kind, blobs, lrn = "", "", [], {}
    for number, value in fields(message):
        if number == numbers["name"]:
            name = bytes(_inner(value)).decode()
        elif number == numbers["type"]:
            kind = V1_TYPES.get(value, str(value)) if isinstance(value, int) else bytes(value).decode()
        elif number == numbers["blobs"]:
            blobs.append(_blob(_inner(value)))
        elif number == numbers["lrn"]:
            lrn = _lrn(_inner(value))
    if kind == "LRN" and not lrn:
        lrn = _lrn(memoryview(b""))
    return Layer(name, kind, blobs, lrn)


def _lrn(message: memoryview) -> dict[str, float]:
    """Return n, alpha, beta, k and whether the windows lie within maps. Caffe divides alpha by n."""
    own: dict[str, float] = {"n": 5, "alpha": 1.0, "beta": 0.75, "k": 1.0, "within": 0}
    for number, value in fields(message):
        name = {1: "n", 2: "alpha", 3: "beta", 4: "within", 5: "k"}.get(number)
        if name:
            own[name] = value if isinstance(value, int) else float(np.frombuffer(value, "<f4")[0])
    return own


def _blob(message: memoryview) -> NDArray[np.float32]:
    """Return the array of a BlobProto, in float32 (field 5) or float64 (8), packed or not."""
    legacy, shape, parts, doubles = [0, 0, 0, 0], None, [], []
    for number, value in fields(message):
        if number in (1, 2, 3, 4) and isinstance(value, int):
            legacy[number - 1] = value
        elif number == 7 and not isinstance(value, int):
            shape = []
            for inner, size in fields(value):
                if inner == 1 and isinstance(size, int):
                    shape.append(size)
                elif inner == 1:  # packed
                    packed, place = _inner(size), 0
                    while place < len(packed):
                        one, place = _varint(packed, place)
                        shape.append(one)
        elif number == 5 and not isinstance(value, int):
            parts.append(np.frombuffer(value, "<f4"))
        elif number == 8 and not isinstance(value, int):
            doubles.append(np.frombuffer(value, "<f8"))
    if not parts and not doubles:
        raise ValueError("an array without numbers")
    data = np.concatenate(parts or doubles).astype(np.float32)
    return data.reshape(shape if shape is not None else [size or 1 for size in legacy])

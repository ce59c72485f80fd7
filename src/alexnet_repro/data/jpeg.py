"""Images of a store as JPEGs, which take a seventh of the space of their RGB values."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

RGB = NDArray[np.uint8]
QUALITY = 95  # of 100, with half as many colour values as grey values along each axis


def decoder() -> str:
    """Return the name and version of what reads and writes JPEGs here; other versions may round differently."""
    return f"Pillow with libjpeg-turbo {features.version_feature('libjpeg_turbo') or 'of unknown version'}"


def encode(image: RGB) -> bytes:
    """Return an image (size, size, 3) as a JPEG."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def decode(data: bytes) -> RGB:
    """Return the image (size, size, 3) of a JPEG that ``encode`` wrote."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)

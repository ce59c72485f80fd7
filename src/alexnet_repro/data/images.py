"""Decode one image and cut the square that a store keeps of it (Section 2)."""

import gzip
import io
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

from alexnet_repro.data.store_writer import RGB


def read_image(read_bytes: Callable[[], bytes], size: int) -> RGB:
    """Decode an image and return its central square, (size, size, 3), scaled with an antialiased bicubic filter.

    This does in one step what Section 2 says: "rescaled the image such that the shorter side was of length 256, and
    then cropped out the central 256x256 patch". Greyscale and CMYK become RGB, an EXIF rotation is applied,
    transparency is dropped, and a gzip-compressed file is unpacked (ILSVRC-2010 has one). Raises OSError or ValueError
    if the file is not a complete image.
    """
    data = read_bytes()
    try:
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        with Image.open(io.BytesIO(data)) as image:
            # A JPEG of more than twice the needed size is decoded at a half, a quarter or an eighth of its size.
            image.draft("RGB", (2 * size, 2 * size))
            ImageOps.exif_transpose(image, in_place=True)
            rgb = image.convert("RGB")
    except (Image.DecompressionBombError, SyntaxError, EOFError, zlib.error) as error:
        raise ValueError(str(error)) from error
    side = min(rgb.size)
    left, top = (rgb.width - side) / 2, (rgb.height - side) / 2
    return np.asarray(rgb.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)))

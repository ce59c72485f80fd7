"""Decode an image and cut its central square for the store (Section 2)."""

import io
import warnings
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

from alexnet_repro.data.listing import LARGEST_FILE
from alexnet_repro.data.jpeg import RGB

LARGEST_IMAGE = 100_000_000  # pixels

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # LARGEST_IMAGE is the limit


def read_image(read_bytes: Callable[[], bytes], size: int) -> RGB:
    """Decode an image and return its central square, scaled to (size, size, 3).

    This combines the two steps of Section 2: "rescaled the image such that the shorter side was of length 256, and then
    cropped out the central 256x256 patch". The filter is bicubic with antialiasing. Greyscale and CMYK images are
    converted to RGB, an EXIF rotation is applied, transparency is dropped, and a gzip-compressed file (ILSVRC-2010 has
    one) is decompressed. Pillow refuses an image whose data end early (its LOAD_TRUNCATED_IMAGES is off). A
    JPEG with damaged data inside decodes to a damaged picture, and Pillow does not say so.

    Raises OSError or ValueError if the file is not an image, if it has more than LARGEST_IMAGE pixels, or if
    it unpacks to more than LARGEST_FILE bytes.
    """
    data = read_bytes()
    try:
        if data[:2] == b"\x1f\x8b":
            unpack = zlib.decompressobj(wbits=31)
            data = unpack.decompress(data, LARGEST_FILE)
            if not unpack.eof:
                raise ValueError(f"it ends early or unpacks to more than {LARGEST_FILE} bytes")
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > LARGEST_IMAGE:
                raise ValueError(f"it has {image.width} x {image.height} pixels, more than {LARGEST_IMAGE}")
            # faster: decode a JPEG of more than twice the required size at 1/2, 1/4 or 1/8 of its size
            image.draft("RGB", (2 * size, 2 * size))
            rgb = to_rgb(image)
    except (OSError, ValueError, MemoryError):
        raise
    except Exception as error:  # Pillow's readers of rare formats raise all kinds for damaged files
        raise ValueError(str(error) or type(error).__name__) from error
    return central_square(rgb, size)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image as 8-bit RGB, turned as its EXIF data say, without transparency.

    Raises ValueError for 32-bit integers and floats, whose range is unknown. 16-bit greys are divided by 257.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray(np.rint(np.asarray(image, np.float64) / 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"its pixels are not 8-bit or 16-bit numbers (mode {image.mode})")
    return image.convert("RGB")


def central_square(rgb: Image.Image, size: int) -> RGB:
    """Return the central square of an RGB image, scaled to (size, size, 3) uint8 (Section 2)."""
    side = min(rgb.size)
    left, top = (rgb.width - side) / 2, (rgb.height - side) / 2
    return np.asarray(rgb.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)))

"""Decode an image and cut its central square for the store (Section 2)."""

import io
import warnings
import zlib
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image, UnidentifiedImageError

from alexnet_repro.data.jpeg import RGB
from alexnet_repro.data.listing import LARGEST_FILE

LARGEST_IMAGE = 100_000_000  # pixels
# What prepare and features read. Pillow has more decoders; some start other programs, and others are rarely tested.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "WEBP", "TIFF", "JPEG2000", "PPM", "TGA", "AVIF", "QOI")
ORIENTATION = 0x0112  # EXIF and TIFF
TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip

warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\..*")  # about metadata
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # LARGEST_IMAGE is the limit


@cache
def formats() -> tuple[str, ...]:
    """Return those of FORMATS that this Pillow can decode."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@cache
def image_suffixes() -> frozenset[str]:
    """Return the endings of the names of image files, in lower case, such as .jpg."""
    known = {*formats(), "MPO"}  # several JPEGs in one file
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in known)


def read_image(read_bytes: Callable[[], bytes], size: int) -> RGB:
    """Decode an image and return its central square, scaled to (size, size, 3).

    This combines the two steps of Section 2: "rescaled the image such that the shorter side was of length 256, and then
    cropped out the central 256x256 patch". The filter is bicubic with antialiasing. Greyscale and CMYK images are
    converted to RGB, an EXIF rotation is applied, transparency is dropped, and a gzip-compressed file (ILSVRC-2010 has
    one) is decompressed. Pillow refuses an image whose data end early (its LOAD_TRUNCATED_IMAGES is off). A
    JPEG with damaged data inside decodes to a damaged picture, and Pillow does not say so.

    Raises OSError or ValueError if the file is not an image in one of FORMATS, if its pixels have a type that ``to_rgb``
    refuses, if it has more than LARGEST_IMAGE pixels, or if it unpacks to more than LARGEST_FILE bytes.
    """
    data = read_bytes()
    try:
        if data[:2] == b"\x1f\x8b":
            unpack = zlib.decompressobj(wbits=31)
            data = unpack.decompress(data, LARGEST_FILE)
            if not unpack.eof:
                raise ValueError(f"it ends early or unpacks to more than {LARGEST_FILE} bytes")
        with Image.open(io.BytesIO(data), formats=formats()) as image:
            if image.width * image.height > LARGEST_IMAGE:
                raise ValueError(f"it has {image.width} x {image.height} pixels, more than {LARGEST_IMAGE}")
            # faster: decode a JPEG of more than twice the required size at 1/2, 1/4 or 1/8 of its size
            image.draft("RGB", (2 * size, 2 * size))
            rgb = to_rgb(image)
    except UnidentifiedImageError:
        if data[:4] in (b"II*\0", b"MM\0*"):
            raise ValueError("it is a TIFF with other kinds of pixels than are read here") from None
        raise ValueError(f"it is in none of the formats {', '.join(formats())}") from None
    except (OSError, ValueError, MemoryError):
        raise
    except Exception as error:  # Pillow's readers of rare formats raise all kinds for damaged files
        raise ValueError(str(error) or type(error).__name__) from error
    return central_square(rgb, size)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image as 8-bit RGB, turned as its EXIF data say, without transparency.

    Greys of 12 and 16 bits are scaled to 8. Raises ValueError for pixels whose meaning is unknown or that Pillow decodes
    to other values: signed integers, 32-bit integers and floats, and TIFF's colours with subsampling or a range of video.
    """
    orientation = _orientation(image)
    depth, is_inverted = 16, False
    if image.format == "TIFF":
        depth, is_inverted = _checked_tiff(image)
    elif image.format == "PPM" and image.mode == "I":  # Pillow scales it to 16 bits
        image = Image.fromarray(np.asarray(image).astype(np.uint16))
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.float64) * (255 / (2**depth - 1))
        image = Image.fromarray(np.rint(255 - grey if is_inverted else grey).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"its pixels are not 8-bit or 16-bit numbers (mode {image.mode})")
    elif image.mode in ("La", "RGBa"):  # premultiplied by its transparency
        image = image.convert(image.mode.upper())
    rgb = image.convert("RGB")
    return rgb.transpose(TURNED[orientation]) if orientation in TURNED else rgb


def _orientation(image: Image.Image) -> int:
    """Return the orientation of the EXIF data, or 1 if there is none that can be read."""
    if image.format == "TIFF":
        return 1  # Pillow turns a TIFF when it decodes it
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # malformed EXIF data must not cost a good image
        return 1
    return found if isinstance(found, int) else 1


def _checked_tiff(image: Image.Image) -> tuple[int, bool]:
    """Return the bits of a grey TIFF, and whether Pillow leaves the inversion of its values to us.

    Raises ValueError for a TIFF that Pillow would decode to other values than its tags say.
    """
    tags = image.tag_v2  # type: ignore[attr-defined]

    def values(tag: int, default: int) -> tuple[int, ...]:
        found = tags.get(tag, default)
        return tuple(found) if isinstance(found, tuple | list) else (found,)

    if set(values(339, 1)) - {1, 4}:  # SampleFormat
        raise ValueError("it is a TIFF of signed integers or floats")
    (photometric,) = values(262, 0)[:1]
    if photometric not in (0, 1, 2, 3, 5, 6):
        raise ValueError(f"it is a TIFF with the photometric interpretation {photometric}")
    if photometric == 6 and values(259, 1)[0] not in (6, 7):  # YCbCr that is not compressed as a JPEG
        full_range = (0.0, 255.0, 128.0, 255.0, 128.0, 255.0)
        if values(530, 2) != (1, 1) or tuple(map(float, tags.get(532, full_range))) != full_range:
            raise ValueError("it is a TIFF of YCbCr values with subsampling or with another range than 0 to 255")
    return values(258, 1)[0], photometric == 0 and image.mode.startswith("I;16")


def central_square(rgb: Image.Image, size: int) -> RGB:
    """Return the central square of an RGB image, scaled to (size, size, 3) uint8 (Section 2)."""
    side = min(rgb.size)
    left, top = (rgb.width - side) / 2, (rgb.height - side) / 2
    return np.asarray(rgb.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)))

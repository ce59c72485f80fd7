"""Compare decoded images with values that were computed without the decoder, over depths, signs and interpretations."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from alexnet_repro.data.images import formats, image_suffixes, read_image

SIDE = 16
RAMP = np.arange(SIDE * SIDE).reshape(SIDE, SIDE)  # 0 to 255


def tiff(data: bytes, order: str = "<", **tags: int | tuple[int, ...]) -> bytes:
    """Return an uncompressed TIFF of SIDE x SIDE pixels, written by hand. tags: t258=... for tag 258."""
    entries = {256: SIDE, 257: SIDE, 259: 1, 273: 8, 277: 1, 278: SIDE, 279: len(data)}
    found = {**entries, **{int(name[1:]): value for name, value in tags.items()}}
    start, extra, fields = 8 + len(data) + len(data) % 2, b"", b""
    after = start + 2 + 12 * len(found) + 4
    for tag, value in sorted(found.items()):
        values = value if isinstance(value, tuple) else (value,)
        kind, code = (4, "I") if tag in (273, 279) else (3, "H")
        packed = struct.pack(f"{order}{len(values)}{code}", *values)
        if len(packed) > 4:
            packed, extra = struct.pack(order + "I", after + len(extra)), extra + packed
        fields += struct.pack(order + "HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, start)
    return head + data.ljust(start - 8, b"\0") + struct.pack(order + "H", len(found)) + fields + bytes(4) + extra


def packed(values: NDArray[np.int64], bits: int, order: str = "<") -> bytes:
    """Return values of so many bits, as rows of bytes."""
    if bits == 16:
        return values.astype(f"{order}u2").tobytes()
    ones = (values[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(ones.reshape(len(values), -1).astype(np.uint8), axis=1).tobytes()


def decoded(data: bytes) -> NDArray[np.int64]:
    return read_image(lambda: data, SIDE).astype(np.int64)


def grey(values: NDArray[np.floating]) -> NDArray[np.floating]:
    return np.repeat(values[..., None], 3, axis=2)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("photometric", [0, 1], ids=["white is zero", "black is zero"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
def test_grey_tiff_has_the_values_of_its_bits(bits: int, photometric: int, order: str) -> None:
    values = RAMP * (2**bits - 1) // 255
    data = tiff(packed(values, bits, order), order, t258=bits, t262=photometric)
    truth = values * 255 / (2**bits - 1)
    try:
        found = decoded(data)
    except ValueError:
        assert (bits == 12 and (order, photometric) != ("<", 1)) or (bits, photometric, order) == (16, 0, ">")
        return
    assert np.abs(found - grey(truth if photometric else 255 - truth)).max() <= 0.51


@pytest.mark.parametrize("kind", ["i1", "<i2", "<i4", "<u4", "<f4", "<f8"])
def test_numbers_without_a_known_range_are_refused(kind: str) -> None:
    values = (RAMP - 128 if kind[-2] == "i" else RAMP).astype(kind)
    sample = {"i": 2, "f": 3, "u": 1}[kind[-2]]
    with pytest.raises((ValueError, OSError)):
        decoded(tiff(values.tobytes(), t258=8 * values.itemsize, t262=1, t339=sample))


COLOURS = np.stack([RAMP, RAMP[::-1], RAMP.T], axis=2)  # red, green, blue


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [8, 16])
def test_rgb_tiff_has_its_values_whatever_the_depth_and_the_planes(bits: int, order: str) -> None:
    scale = 1 if bits == 8 else 257
    raw = (COLOURS * scale).astype("u1" if bits == 8 else f"{order}u2")
    plain = {"t258": (bits,) * 3, "t262": 2, "t277": 3}
    assert np.abs(decoded(tiff(raw.tobytes(), order, **plain)) - COLOURS).max() <= 1
    if bits == 8:
        size, start = SIDE * SIDE, 8
        planes = {"t273": tuple(start + i * size for i in range(3)), "t279": (size,) * 3, "t284": 2}
        assert np.array_equal(decoded(tiff(raw.transpose(2, 0, 1).tobytes(), order, **plain, **planes)), COLOURS)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("premultiplied", [False, True])
@pytest.mark.parametrize("colours", [1, 3])
def test_transparency_is_dropped_and_not_part_of_the_colours(colours: int, premultiplied: bool, bits: int) -> None:
    alpha = np.where(RAMP % 3 == 0, 255, 128)[..., None]
    straight = COLOURS[..., :colours]
    stored = straight * alpha / 255 if premultiplied else straight
    scale, kind = (1, "u1") if bits == 8 else (257, "<u2")
    raw = np.concatenate([np.rint(stored * scale), alpha * scale], axis=2).astype(kind)
    channels = colours + 1
    data = tiff(
        raw.tobytes(), t258=(bits,) * channels, t262=2 if colours == 3 else 1, t277=channels, t338=2 - premultiplied
    )
    try:
        found = decoded(data)
    except (ValueError, OSError):
        assert (colours, bits) == (1, 16), "only 16-bit grey with transparency may be refused"
        return
    assert np.abs(found - np.broadcast_to(straight, found.shape)).max() <= 2


def test_cmyk_and_palette_tiffs_have_their_colours() -> None:
    inks = np.concatenate([255 - COLOURS, np.zeros((SIDE, SIDE, 1), int)], axis=2).astype("u1")
    assert np.abs(decoded(tiff(inks.tobytes(), t258=(8,) * 4, t262=5, t277=4)) - COLOURS).max() <= 1
    palette = (np.stack([np.arange(256), np.arange(256)[::-1], np.arange(256) ^ 0x55]) * 257).ravel()
    data = tiff(RAMP.astype("u1").tobytes(), t258=8, t262=3, t320=tuple(palette.tolist()))
    assert np.array_equal(decoded(data), np.stack([RAMP, 255 - RAMP, RAMP ^ 0x55], axis=2))


@pytest.mark.parametrize("subsampling", [(1, 1), (2, 2), None])
def test_ycbcr_tiff_is_converted_or_refused(subsampling: tuple[int, int] | None) -> None:
    y, cb, cr = (
        channel.astype(float) for channel in np.stack([RAMP, np.full_like(RAMP, 100), np.full_like(RAMP, 150)])
    )
    raw = np.stack([y, cb, cr], axis=2).astype("u1").tobytes()
    tags = {} if subsampling is None else {"t530": subsampling}
    data = tiff(raw, t258=(8,) * 3, t262=6, t277=3, **tags)  # type: ignore[arg-type]
    if subsampling != (1, 1):
        with pytest.raises(ValueError, match="subsampling"):
            decoded(data)
        return
    r, b = y + 1.402 * (cr - 128), y + 1.772 * (cb - 128)  # CCIR 601
    g = (y - 0.299 * r - 0.114 * b) / 0.587
    assert np.abs(decoded(data) - np.stack([r, g, b], axis=2).clip(0, 255)).max() <= 1


@pytest.mark.parametrize("photometric", [4, 8, 9, 10, 32844, 32845])
def test_other_interpretations_of_a_tiff_are_refused(photometric: int) -> None:
    with pytest.raises((ValueError, OSError)):
        decoded(tiff(COLOURS.astype("u1").tobytes(), t258=(8,) * 3, t262=photometric, t277=3))


TURNS = {  # EXIF's definition: where the first row and the first column of the stored image belong
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}  # fmt: skip


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("form", ["TIFF", "PNG", "JPEG"])
def test_images_are_turned_once_as_their_metadata_say(form: str, orientation: int) -> None:
    if form == "TIFF":
        data = tiff(COLOURS.astype("u1").tobytes(), t258=(8,) * 3, t262=2, t277=3, t274=orientation)
    else:
        file, exif = io.BytesIO(), Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(COLOURS.astype("u1")).save(
            file, form, exif=exif, **({"quality": 100} if form == "JPEG" else {})
        )
        data = file.getvalue()
    stored = Image.open(io.BytesIO(data)) if form == "JPEG" else None
    plain = np.asarray(stored.convert("RGB")).astype(int) if stored else COLOURS
    assert np.array_equal(decoded(data), TURNS[orientation](plain))


@pytest.mark.filterwarnings("ignore:.*EXIF|Tag data|Truncated")
def test_malformed_exif_data_do_not_cost_an_image() -> None:
    """Bytes of the EXIF block are changed at random; the pixels are the same, turned or not."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x8769] = 6, "a camera", {0x9003: "2020:01:01 00:00:00", 0x829A: (1, 100)}
    Image.fromarray(COLOURS.astype("u1")).save(file, "JPEG", quality=100, exif=exif)
    good = file.getvalue()
    plain = np.asarray(Image.open(io.BytesIO(good)).convert("RGB")).astype(int)
    allowed = [turn(plain) for turn in TURNS.values()]
    start = good.index(b"Exif\0\0") + 6
    (length,) = struct.unpack(">H", good[start - 8 : start - 6])  # of the segment
    rng = np.random.default_rng(0)
    for _ in range(3000):
        data = bytearray(good)
        for place in rng.integers(start, start + length - 8, rng.integers(1, 6)):
            data[place] = rng.integers(256)
        found = decoded(bytes(data))
        assert any(np.array_equal(found, image) for image in allowed)


@pytest.mark.parametrize("maxval", [1, 100, 255, 1000, 65535])
@pytest.mark.parametrize("magic", ["P5", "P6"])
def test_pnm_is_scaled_by_its_largest_value(magic: str, maxval: int) -> None:
    values = (COLOURS if magic == "P6" else RAMP) * maxval // 255
    raw = values.astype("u1" if maxval < 256 else ">u2").tobytes()
    truth = values * 255 / maxval
    found = decoded(f"{magic} {SIDE} {SIDE} {maxval}\n".encode() + raw)
    assert np.abs(found - (truth if magic == "P6" else grey(truth))).max() <= 1


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("kind", [0, 2, 3, 4, 6], ids=["grey", "rgb", "palette", "grey and alpha", "rgb and alpha"])
def test_png_has_the_values_of_its_bits(kind: int, bits: int) -> None:
    if (kind in (2, 4, 6) and bits < 8) or (kind == 3 and bits == 16):
        pytest.skip("PNG does not define it")
    top = 2**bits - 1
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    values = np.concatenate([COLOURS, RAMP[..., None] // 2 + 64], axis=2) * top // 255
    if channels < 3:
        values = np.concatenate([values[..., :1], values[..., 3:]], axis=2)[..., :channels]
    values = values[..., :channels]
    rows = packed(values.reshape(SIDE, -1), bits, ">")
    row = len(rows) // SIDE
    lines = b"".join(b"\0" + rows[i * row : (i + 1) * row] for i in range(SIDE))

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    palette = (
        np.stack([np.arange(top + 1), np.arange(top + 1)[::-1], np.full(top + 1, 77)], axis=1) if kind == 3 else None
    )
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, bits, kind, 0, 0, 0))
    if palette is not None:
        data += chunk(b"PLTE", palette.astype("u1").tobytes())
    data += chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    truth = palette[values[..., 0]] if palette is not None else values[..., : 3 if channels > 2 else 1] * 255 / top
    assert np.abs(decoded(data) - truth).max() <= 1


def test_bmp_of_16_24_and_32_bits_have_their_colours() -> None:
    def bmp(bits: int, raw: bytes, masks: bytes = b"") -> bytes:
        head = struct.pack("<IiiHHIIiiII", 40, SIDE, -SIDE, 1, bits, 3 if masks else 0, len(raw), 0, 0, 0, 0) + masks
        return b"BM" + struct.pack("<IHHI", 14 + len(head) + len(raw), 0, 0, 14 + len(head)) + head + raw

    bgr = COLOURS[..., ::-1].astype("u1")
    four = np.concatenate([bgr, np.full((SIDE, SIDE, 1), 9, "u1")], axis=2)
    assert np.array_equal(decoded(bmp(24, bgr.tobytes())), COLOURS)
    assert np.array_equal(decoded(bmp(32, four.tobytes())), COLOURS)
    fives = COLOURS >> 3
    word = (fives[..., 0] << 10 | fives[..., 1] << 5 | fives[..., 2]).astype("<u2")
    assert np.abs(decoded(bmp(16, word.tobytes())) - fives * 255 / 31).max() <= 1
    word = (fives[..., 0] << 11 | (COLOURS[..., 1] >> 2) << 5 | fives[..., 2]).astype("<u2")
    truth = np.stack([fives[..., 0] * 255 / 31, (COLOURS[..., 1] >> 2) * 255 / 63, fives[..., 2] * 255 / 31], axis=2)
    found = decoded(bmp(16, word.tobytes(), struct.pack("<III", 0xF800, 0x7E0, 0x1F)))
    assert np.abs(found - truth).max() <= 1


def test_jpeg_2000_of_16_bits_is_scaled_to_8() -> None:
    file = io.BytesIO()
    Image.fromarray((RAMP * 257).astype(np.uint16)).save(file, "JPEG2000", irreversible=False)
    assert np.array_equal(decoded(file.getvalue()), grey(RAMP.astype(float)))


def test_formats_that_start_programs_or_are_not_listed_are_refused_by_name() -> None:
    for data in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n", b"gimp xcf v011\0"):
        with pytest.raises(ValueError, match="none of the formats JPEG, PNG"):
            decoded(data)
    for suffix in (".jpg", ".jfif", ".jpe", ".jp2", ".tga", ".mpo", ".ppm", ".pbm", ".tif", ".gif", ".webp"):
        assert suffix in image_suffixes()
    assert ".eps" not in image_suffixes()
    assert (".avif" in image_suffixes()) == ("AVIF" in formats())


def test_first_command_of_a_process_knows_the_formats(tmp_path: Path) -> None:
    """Pillow loads its decoders when they are first needed."""
    Image.fromarray(COLOURS.astype("u1")).save(tmp_path / "a.tga")
    code = f"from alexnet_repro.data.images import read_image; read_image(open({str(tmp_path / 'a.tga')!r}, 'rb').read, 16)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

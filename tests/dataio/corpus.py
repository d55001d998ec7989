"""Images good and bad, all built here: what every test of bad data draws from.

Each good one is HEIGHT x WIDTH; `tolerance` is how far its decoded pixels may be from Pillow's. Each bad one has the kind of reason it must
be refused with.
"""

import functools
import io
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

HEIGHT, WIDTH = 24, 40
MAX_PIXELS = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Good:
    name: str
    data: bytes
    tolerance: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Bad:
    name: str
    data: bytes
    kind: str


def picture(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """(height, width, 3) uint8: smooth, in all colours, different for each seed."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def encode(image: np.ndarray | Image.Image, format: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(out, format, **options)
    return out.getvalue()


def pillow(data: bytes) -> np.ndarray:
    """Pillow's upright RGB pixels; 16 bits of gray scaled to 8, where Pillow's own conversion clips."""
    image = Image.open(io.BytesIO(data))
    if image.mode in ("I;16", "I"):
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.format in ("JPEG", "PNG"):
        image = ImageOps.exif_transpose(image)
    return np.asarray(image.convert("RGB"))


def chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG chunk."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(
    *, color: int = 2, bits: int = 8, rows: np.ndarray | None = None, packed: bytes | None = None, extra: bytes = b"",
    height: int = HEIGHT, width: int = WIDTH, interlace: int = 0,
) -> bytes:  # fmt: skip
    """A PNG from its parts; `rows` (height, bytes a row) uint8, or `packed`, the content of IDAT."""
    if packed is None:
        assert rows is not None
        packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, interlace)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def raw_bmp(bits: int, pixels: bytes, *, palette: bytes = b"", top_down: bool = False) -> bytes:
    offset = 14 + 40 + len(palette)
    file = b"BM" + struct.pack("<IHHI", offset + len(pixels), 0, 0, offset)
    height = -HEIGHT if top_down else HEIGHT
    return file + struct.pack("<IiiHHIIiiII", 40, WIDTH, height, 1, bits, 0, len(pixels), 0, 0, len(palette) // 4, 0) + palette + pixels


@functools.cache
def good() -> tuple[Good, ...]:
    rng = np.random.default_rng(7)
    array = picture(1)
    image = Image.fromarray(array)
    alpha = Image.fromarray(np.concatenate([array, array[..., :1]], -1))
    deep = rng.integers(0, 65536, (HEIGHT, WIDTH, 4)).astype(">u2")
    gray16 = np.random.default_rng(8).integers(0, 65536, (HEIGHT, WIDTH)).astype(np.uint16)

    def noise(row_bytes: int) -> np.ndarray:
        return rng.integers(0, 256, (HEIGHT, row_bytes)).astype(np.uint8)

    palette = chunk(b"PLTE", bytes(range(48)))
    cases = {
        "png rgb": encode(image),
        "png gray": encode(image.convert("L")),
        "png 1 bit": encode(image.convert("1")),
        "png gray 2 bits": raw_png(color=0, bits=2, rows=noise(WIDTH // 4)),
        "png gray 4 bits": raw_png(color=0, bits=4, rows=noise(WIDTH // 2)),
        "png palette": encode(image.convert("P")),
        "png palette 4 bits, transparent": raw_png(color=3, bits=4, rows=noise(WIDTH // 2), extra=palette + chunk(b"tRNS", b"\0\x80")),
        "png rgba": encode(alpha),
        "png gray alpha": encode(image.convert("LA")),
        "png gray, transparent": raw_png(color=0, rows=noise(WIDTH), extra=chunk(b"tRNS", b"\0\7")),
        "png interlaced": raw_png(packed=zlib.compress(_adam7(array)), interlace=1),
        "png gamma": raw_png(rows=array.reshape(HEIGHT, -1), extra=chunk(b"gAMA", struct.pack(">I", 100_000))),
        "png, bytes behind": encode(image) + b"behind",
        "jpeg": encode(image, "JPEG", quality=90),
        "jpeg progressive": encode(image, "JPEG", quality=90, progressive=True),
        "jpeg 444": encode(image, "JPEG", quality=80, subsampling=0),
        "jpeg rgb": encode(image, "JPEG", keep_rgb=True),
        "jpeg extended": encode(image, "JPEG").replace(b"\xff\xc0", b"\xff\xc1", 1),
        "jpeg gray": encode(image.convert("L"), "JPEG"),
        "jpeg cmyk": encode(image.convert("CMYK"), "JPEG"),
        "jpeg, bytes behind": encode(image, "JPEG") + bytes(50),
        "webp lossless": encode(image, "WEBP", lossless=True),
        "webp lossy": encode(image, "WEBP", quality=80),
        "webp lossless alpha": encode(alpha, "WEBP", lossless=True),
        "webp lossy alpha": encode(alpha, "WEBP", quality=80),
        "webp with metadata": encode(image, "WEBP", lossless=True, exif=_orientation(1)),
        "bmp": encode(image, "BMP"),
        "bmp gray": encode(image.convert("L"), "BMP"),
        "bmp 1 bit": encode(image.convert("1"), "BMP"),
        "bmp 4 bits": raw_bmp(4, noise(WIDTH // 2).tobytes(), palette=bytes(range(64))),
        "bmp 32 bits": raw_bmp(32, noise(WIDTH * 4).tobytes()),
        "bmp top down": raw_bmp(24, array.tobytes(), top_down=True),
        "tiff": encode(image, "TIFF"),
        "tiff lzw": encode(image, "TIFF", compression="tiff_lzw"),
        "tiff deflate gray": encode(image.convert("L"), "TIFF", compression="tiff_adobe_deflate"),
        "tiff packbits rgba": encode(alpha, "TIFF", compression="packbits"),
        "tiff cmyk": encode(image.convert("CMYK"), "TIFF"),
        "png gray 16 bits": raw_png(color=0, bits=16, rows=gray16.astype(">u2").view(np.uint8)),
        "tiff gray 16 bits": encode(Image.fromarray(gray16), "TIFF"),
        "tiff lzw gray 16 bits": encode(Image.fromarray(gray16), "TIFF", compression="tiff_lzw"),
        "gif": encode(image, "GIF"),
        "gif gray": encode(image.convert("L"), "GIF"),
        "gif with a comment and transparency": encode(image.convert("P"), "GIF", comment=b"from a camera", transparency=3),
        "ppm": encode(image, "PPM"),
        "ppm with a comment": encode(image, "PPM").replace(b"\n", b"\n# made by hand\n", 1),
        "pgm": encode(image.convert("L"), "PPM"),
        "pgm 16 bits": encode(Image.fromarray(gray16), "PPM"),
        "pbm": encode(image.convert("1"), "PPM"),
    }
    near = {
        "png rgb 16 bits": raw_png(bits=16, rows=deep[..., :3].reshape(HEIGHT, -1)),
        "png rgba 16 bits": raw_png(color=6, bits=16, rows=deep.reshape(HEIGHT, -1)),
        "png gray alpha 16 bits": raw_png(color=4, bits=16, rows=deep[..., :2].reshape(HEIGHT, -1)),
        "tiff palette": encode(image.convert("P"), "TIFF"),
        "tiff ycbcr": encode(image.convert("YCbCr"), "TIFF"),
    }
    turned = Image.fromarray(picture(2, WIDTH, HEIGHT))  # upright it is HEIGHT x WIDTH
    for number in (2, 3, 4):
        cases[f"jpeg orientation {number}"] = encode(image, "JPEG", exif=_orientation(number))
        cases[f"png orientation {number}"] = encode(image, exif=_orientation(number))
    for number in (5, 6, 7, 8):
        cases[f"jpeg orientation {number}"] = encode(turned, "JPEG", exif=_orientation(number))
        cases[f"png orientation {number}"] = encode(turned, exif=_orientation(number))
    return (
        *(Good(name=name, data=data) for name, data in cases.items()),
        *(Good(name=name, data=data, tolerance=1) for name, data in near.items()),
    )


@functools.cache
def bad() -> tuple[Bad, ...]:
    array = picture(3)
    image = Image.fromarray(array)
    frames = [Image.fromarray(picture(4))]
    png, jpeg = encode(image), encode(image, "JPEG", quality=90)
    webp, bmp, tiff = encode(image, "WEBP", lossless=True), encode(image, "BMP"), encode(image, "TIFF")
    rows = array.reshape(HEIGHT, -1)
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    idat, scan = png.index(b"IDAT"), jpeg.index(b"\xff\xda")
    tables = bytearray(jpeg)
    at = jpeg.index(b"\xff\xc4")
    tables[at + 5 : at + 21] = b"\xff" * 16
    frame = jpeg.index(b"\xff\xc0")
    gif, ppm = encode(image, "GIF"), encode(image, "PPM")

    def patched(data: bytes, place: int, new: bytes) -> bytes:
        return data[:place] + new + data[place + len(new) :]

    return tuple(
        Bad(name=name, data=data, kind=kind)
        for kind, cases in {
            "empty": {"no bytes": b""},
            "unknown format": {
                "garbage": np.random.default_rng(0).integers(0, 256, 500).astype(np.uint8).tobytes(),
                "one byte": b"\0",
                "zeros": bytes(1000),
                "html": b"<!DOCTYPE html><html><body>404</body></html>",
                "zip": b"PK\x03\x04" + bytes(100),
                "heic": bytes([0, 0, 0, 24]) + b"ftypheic" + bytes(100),
                "wav": b"RIFF" + struct.pack("<I", 100) + b"WAVE" + bytes(100),
            },
            "truncated": {
                "png signature only": png[:8],
                "png half a signature": png[:5],
                "png header only": png[:33],
                "png half": png[: len(png) // 2],
                "png without IEND": png[:-12],
                "png, last byte missing": png[:-1],
                "jpeg 3 bytes": jpeg[:3],
                "jpeg half a header": jpeg[: scan // 2],
                "jpeg half": jpeg[: scan + (len(jpeg) - scan) // 2],
                "jpeg without EOI": jpeg[:-2],
                "webp half": webp[: len(webp) // 2],
                "webp header": webp[:14],
                "bmp half": bmp[: len(bmp) // 2],
                "bmp header": bmp[:20],
                "tiff half": tiff[: len(tiff) // 2],
                "gif half": gif[: len(gif) // 2],
                "gif without its end": gif[:-1],
                "ppm half": ppm[: len(ppm) // 2],
                "tiff header": tiff[:8],
            },
            "damaged": {
                "png IHDR CRC": patched(png, 29, bytes([png[29] ^ 1])),
                "png IDAT CRC": patched(png, idat + 20, bytes([png[idat + 20] ^ 1])),
                "png zero width": raw_png(rows=rows, width=0),
                "png without IDAT": png[:33] + chunk(b"IEND", b""),
                "gif of no frame": gif[: 13 + 768] + b";",
                "ppm without its height": b"P6 40 x",
                "png color type 5": raw_png(color=5, rows=rows),
                "jpeg zero height": patched(jpeg, frame + 5, b"\0\0"),
                "jpeg rubbish in its header": patched(jpeg, 20, b"\0\0"),
                "webp without its signature": patched(webp, 20, b"\0"),
                "tiff without width": patched(tiff, tiff.index(struct.pack("<HH", 256, 4)), struct.pack("<HH", 65000, 4)),
            },
            "too large": {
                "png bomb": raw_png(packed=packed, height=60_000, width=60_000),
                "jpeg bomb": patched(jpeg, frame + 5, struct.pack(">HH", 60_000, 60_000)),
                "png bomb of 1 row": raw_png(packed=packed, height=1, width=2**31 - 1),
            },
            "animated": {
                "gif of two frames": encode(image, "GIF", save_all=True, append_images=frames),
                "apng": encode(image, save_all=True, append_images=frames),
                "webp of two frames": encode(image, "WEBP", save_all=True, append_images=frames),
                "tiff of two pages": encode(image, "TIFF", save_all=True, append_images=frames),
            },
            "unsupported": {
                "ppm of values up to 100": b"P6 40 24 100\n" + bytes(HEIGHT * WIDTH * 3),
                "tiff float": encode(image.convert("F"), "TIFF"),
                "tiff 1 bit": encode(image.convert("1"), "TIFF"),
                "tiff gray alpha": encode(image.convert("LA"), "TIFF"),
                "tiff turned": encode(image, "TIFF", exif=_orientation(6)),
                "bmp 16 bits": raw_bmp(16, bytes(WIDTH * HEIGHT * 2)),
                "jpeg 12 bits": patched(jpeg, frame + 4, b"\x0c"),
                "jpeg arithmetic": patched(jpeg, frame + 1, b"\xc9"),
            },
            "undecodable": {
                "png data end early, CRC right": raw_png(packed=packed[: len(packed) // 2]),
                "png data not zlib, CRC right": raw_png(packed=b"not zlib at all"),
                "png too few rows": raw_png(packed=zlib.compress(b"\0" * 50)),
                "jpeg broken tables": bytes(tables),
                "webp lossless damage": patched(webp, 60, bytes([webp[60] ^ 0xFF])),
            },
            "wrong size": {  # of a Decoder with fit="refuse" alone
                "png larger": encode(picture(6, HEIGHT + 1, WIDTH)),
                "png turned": encode(picture(6, WIDTH, HEIGHT)),
                "jpeg smaller": encode(picture(6, HEIGHT // 2, WIDTH // 2), "JPEG"),
                "jpeg turned by its orientation": encode(picture(6), "JPEG", exif=_orientation(6)),
            },
        }.items()
        for name, data in cases.items()
    )


def _adam7(array: np.ndarray) -> bytes:
    """The rows of an interlaced RGB PNG: seven passes, each a grid of (first row, first column, step down, step right)."""
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    grids = [array[top::down, left::right] for top, left, down, right in passes]
    return b"".join(b"\0" + row.tobytes() for grid in grids for row in grid)


def _orientation(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif

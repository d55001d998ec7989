"""Reads an image's header: its size and mode, or the reason to refuse it. Called by decode before any decoder sees the bytes.

This comes first because DALI's error for a bad image often names no sample, because a decompression bomb is cheap to refuse by its header
alone, and because DALI silently accepts some damage. An image that passes can still fail in the decoder (damaged compressed data); decode
finds it by bisection.

Accepted formats; tests/dataio/test_sniff_decode.py compares every line with Pillow's `convert("RGB")`:

| format | accepted | equals Pillow |
|---|---|---|
| PNG | gray 1/2/4/8 bits, palette, RGB, RGBA, gray+alpha, interlaced; alpha and transparency are dropped | exactly |
| PNG | gray of 16 bits, scaled from 0..65535 to 0..255 | exactly (rounded; Pillow's `convert` clips) |
| PNG | RGB, RGBA, gray+alpha of 16 bits | within 1 (DALI rounds, Pillow takes the high byte) |
| JPEG | baseline, extended, progressive of 8 bits; gray, YCbCr, RGB, CMYK | exactly on a CPU (both use libjpeg-turbo) |
| WebP | lossy, lossless; alpha is dropped, metadata (its orientation too) ignored | exactly |
| BMP | uncompressed of 1, 4, 8, 24, 32 bits | exactly |
| TIFF | one page, 8 bits: gray, RGB, RGBA, CMYK; palette and YCbCr within 1 | exactly |
| TIFF | one page, gray of 16 bits, scaled as a PNG's | exactly |
| GIF | of one frame; decode.py has Pillow read it, because DALI cannot | exactly |
| PNM | binary: P4, P5 and P6 of 8 or 16 bits | exactly |

With `data.background`, decode.py puts transparent images in front of a colour; Pillow reads them then.

An EXIF orientation in a JPEG or PNG is applied; height and width are those of the upright image.

Refused images (`kind: detail`; the kinds are KINDS):

| reason | cases |
|---|---|
| empty | no bytes |
| unknown format | garbage, zip, HTML, HEIC, AVIF, JPEG 2000, ...: anything but the formats above |
| truncated | header cut off, PNG without IEND, JPEG without EOI, WebP or BMP shorter than they say, TIFF tables beyond the end |
| damaged | a PNG chunk's CRC (pixel data included), zero size, impossible header fields |
| too large | more than max_pixels by the header: a decompression bomb |
| animated | GIF or WebP of several frames, APNG, TIFF of several pages |
| unsupported | lossless/arithmetic/12-bit JPEG, compressed or 16-bit BMP, other TIFF modes, other PNM depths |

Not detected, because the decoders silently fill in what is missing: damage within the compressed data of a JPEG, lossy WebP or TIFF.
"""

import re
import struct
import zlib
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from dataio.codecs.codec import Refusal
from dataio.formats import ACCEPTED_FORMATS

MAX_PARTS = 1 << 18
"""Chunks of a PNG, segments of a JPEG's header, or fill bytes between them."""
MAX_SCANS = 200
"""Of a progressive JPEG; encoders write some 10."""
MAX_STRIPS = 1 << 18
"""Values of a TIFF tag."""

Format = Literal["png", "jpeg", "webp", "bmp", "tiff", "gif", "pnm"]
KINDS = (
    "empty",
    "unknown format",
    "truncated",
    "damaged",
    "too large",
    "animated",
    "unsupported",
    "wrong size",  # by decode: data.fit=refuse
    "undecodable",  # by decode: the decoder failed
    "no image",  # by sources: a null
    "unreadable",  # by sources: the file cannot be read
    "bad label",  # by convert
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What the header contains; height and width as displayed (after the EXIF orientation)."""

    format: Format
    height: int
    width: int
    mode: str
    """The pixel format by the file format's own name: gray, gray-alpha, palette, rgb, rgba, ycbcr, cmyk."""
    bits: int
    """Bits a channel (for a palette, bits an index)."""
    has_alpha: bool = False
    """It may be transparent somewhere: an alpha channel, or a colour that is none."""

    @property
    def size(self) -> str:
        """The size as the manifest counts it."""
        return f"{self.height}x{self.width}"


class _Refused(Exception):
    pass


def sniff(data: np.ndarray | bytes, *, max_pixels: int) -> Header | Refusal:
    """The header of encoded image `data` ((bytes,) uint8), or the reason to refuse it."""
    raw = data.data.cast("B") if isinstance(data, np.ndarray) else data
    try:
        header = _header(raw)
    except _Refused as refused:
        return Refusal(reason=str(refused))
    except (struct.error, IndexError):
        return Refusal(reason=f"truncated: the header ends after {len(raw)} bytes")
    if header.height < 1 or header.width < 1:
        return Refusal(reason=f"damaged: a {header.format} of {header.height}x{header.width} pixels")
    if header.height * header.width > max_pixels:
        return Refusal(
            reason=f"too large: {header.height}x{header.width} pixels, more than data.max_image_pixels={max_pixels}",
        )
    return header


def _header(raw: bytes | memoryview) -> Header:
    start = bytes(raw[:16])
    if not start:
        raise _Refused("empty: no bytes")
    for magic, read in _READERS:
        if start.startswith(magic):
            return read(raw)
        if magic.startswith(start):
            raise _Refused(f"truncated: the header ends after {len(start)} bytes")
    raise _Refused(f"unknown format: begins with {_known(start)}; accepted are {ACCEPTED_FORMATS}")


def _known(start: bytes) -> str:
    for at, magic, name in ((0, b"PK\x03\x04", "zip"), (0, b"\x1f\x8b", "gzip"), (0, b"%PDF", "PDF"), (4, b"ftyp", "HEIC, AVIF or video")):
        if start[at : at + len(magic)] == magic:
            return f"{start[:8].hex()} ({name})"
    return start[:8].hex()


# PNG: https://www.w3.org/TR/png-3/


_PNG_MODES = {
    0: ("gray", (1, 2, 4, 8, 16)),
    2: ("rgb", (8, 16)),
    3: ("palette", (1, 2, 4, 8)),
    4: ("gray-alpha", (8, 16)),
    6: ("rgba", (8, 16)),
}


def _png(raw: bytes | memoryview) -> Header:
    if raw[12:16] != b"IHDR" or struct.unpack_from(">I", raw, 8)[0] != 13:
        raise _Refused("damaged: a PNG whose first chunk is not IHDR") if len(raw) >= 16 else _Refused("truncated: a PNG without IHDR")
    width, height, bits, color, compression, filtering, interlace = struct.unpack_from(">IIBBBBB", raw, 16)
    at, orientation, pixels, transparent = 8, 1, False, color in (4, 6)
    for _ in range(MAX_PARTS):
        if at + 12 > len(raw):
            raise _Refused("truncated: a PNG without IEND")
        (size,) = struct.unpack_from(">I", raw, at)
        kind, end = bytes(raw[at + 4 : at + 8]), at + 12 + size
        if end > len(raw):
            raise _Refused(
                f"truncated: the PNG ends inside its {kind.decode('latin-1')} chunk" if kind.isalpha() else "damaged: a PNG chunk's name"
            )
        if zlib.crc32(raw[at + 4 : end - 4]) != struct.unpack_from(">I", raw, end - 4)[0]:
            raise _Refused(f"damaged: the CRC of a PNG chunk ({kind.decode('latin-1') if kind.isalpha() else kind.hex()}) is wrong")
        if kind == b"acTL":
            raise _Refused("animated: an APNG")
        if kind == b"eXIf":
            orientation = _exif_orientation(bytes(raw[at + 8 : end - 4]))
        pixels = pixels or kind == b"IDAT"
        transparent = transparent or kind == b"tRNS"
        at = end
        if kind == b"IEND":
            break
    else:
        raise _Refused(f"damaged: a PNG of more than {MAX_PARTS} chunks")
    if color not in _PNG_MODES or bits not in _PNG_MODES[color][1] or compression or filtering or interlace > 1:
        raise _Refused(f"damaged: a PNG of color type {color}, {bits} bits, methods {compression}, {filtering}, {interlace}")
    if not pixels:
        raise _Refused("damaged: a PNG without pixel data")
    mode = _PNG_MODES[color][0]
    if orientation >= 5:
        height, width = width, height
    return Header(format="png", height=height, width=width, mode=mode, bits=bits, has_alpha=transparent)


# JPEG: ITU-T T.81, annex B


_FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}


def _jpeg(raw: bytes | memoryview) -> Header:
    at, orientation = 2, 1
    frame: tuple[int, int, int, int] | None = None
    is_progressive, fill = False, 0
    for _ in range(MAX_PARTS):
        while raw[at] == 0xFF and raw[at + 1] == 0xFF:  # fill bytes
            at += 1
            fill += 1
            if fill > MAX_PARTS:
                raise _Refused("damaged: a JPEG whose header has no end")
        if raw[at] != 0xFF:
            raise _Refused(f"damaged: no JPEG marker at byte {at}")
        marker = raw[at + 1]
        if marker == 0xD9:
            raise _Refused("truncated: a JPEG without a scan")
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:
            at += 2
            continue
        (size,) = struct.unpack_from(">H", raw, at + 2)
        if size < 2:
            raise _Refused(f"damaged: a JPEG segment of {size} bytes")
        if at + 2 + size > len(raw):
            raise _Refused("truncated: the JPEG ends inside its header")
        if marker in _FRAMES and frame is None:
            bits, height, width, channels = struct.unpack_from(">BHHB", raw, at + 4)
            if marker not in (0xC0, 0xC1, 0xC2) or bits != 8:
                raise _Refused(f"unsupported: a JPEG of {bits} bits, coding process {marker - 0xC0}")
            if channels not in (1, 3, 4):
                raise _Refused(f"unsupported: a JPEG of {channels} channels")
            frame, is_progressive = (bits, height, width, channels), marker == 0xC2
        elif marker == 0xE1 and raw[at + 4 : at + 10] == b"Exif\0\0":
            orientation = _exif_orientation(bytes(raw[at + 10 : at + 2 + size]))
        at += 2 + size
        if marker == 0xDA:
            break
    else:
        raise _Refused(f"damaged: a JPEG of more than {MAX_PARTS} segments")
    if frame is None:
        raise _Refused("damaged: a JPEG scan without a frame")
    bits, height, width, channels = frame
    if raw[-2:] != b"\xff\xd9" and b"\xff\xd9" not in bytes(raw[at:]):  # some cameras append data after the end
        raise _Refused("truncated: a JPEG without its end marker (EOI)")
    if is_progressive and (scans := 1 + bytes(raw[at:]).count(b"\xff\xda")) > MAX_SCANS:  # each scan passes over all pixels again
        raise _Refused(f"unsupported: a JPEG of {scans} scans")
    if orientation >= 5:
        height, width = width, height
    return Header(format="jpeg", height=height, width=width, mode={1: "gray", 3: "ycbcr", 4: "cmyk"}[channels], bits=bits)


def _exif_orientation(tiff: bytes) -> int:
    """Tag 274 of the first directory; 1 (upright) where it cannot be read, as in decoders."""
    try:
        order = {b"II": "<", b"MM": ">"}[tiff[:2]]
        (at,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", tiff, entry)
            if tag == 274 and kind == 3:
                value = struct.unpack_from(order + "H", tiff, entry + 8)[0]
                return int(value) if 1 <= value <= 8 else 1
    except (KeyError, struct.error):
        pass
    return 1


# WebP: RFC 9649


def _webp(raw: bytes | memoryview) -> Header:
    if bytes(raw[8:12]) != b"WEBP":
        raise _Refused("unknown format: a RIFF file that is not WebP" if len(raw) >= 12 else "truncated: the header ends in RIFF")
    length = struct.unpack_from("<I", raw, 4)[0] + 8
    if length > len(raw):
        raise _Refused(f"truncated: a WebP of {length} bytes ends after {len(raw)}")
    kind = bytes(raw[12:16])
    if kind == b"VP8X":
        flags = raw[20]
        if flags & 0x02:
            raise _Refused("animated: a WebP of several frames")
        header = _webp(simple_webp(raw))
        return replace(header, has_alpha=header.has_alpha or bool(flags & 0x10))
    if kind == b"VP8L":
        packed = struct.unpack_from("<I", raw, 21)[0]
        if raw[20] != 0x2F:
            raise _Refused("damaged: a lossless WebP without its signature")
        alpha = packed >> 28 & 1
        return Header(
            format="webp",
            height=(packed >> 14 & 0x3FFF) + 1,
            width=(packed & 0x3FFF) + 1,
            mode="rgba" if alpha else "rgb",
            bits=8,
            has_alpha=bool(alpha),
        )
    if kind == b"VP8 ":
        if bytes(raw[23:26]) != b"\x9d\x01\x2a":
            raise _Refused("damaged: a lossy WebP without its start code")
        width, height = struct.unpack_from("<HH", raw, 26)
        return Header(format="webp", height=height & 0x3FFF, width=width & 0x3FFF, mode="rgb", bits=8)
    raise _Refused(f"damaged: a WebP that begins with chunk {kind.hex()}")


def simple_webp(raw: bytes | memoryview) -> bytes:
    """Turns an extended WebP into a simple one, without alpha plane and metadata, on which DALI 2.4's parser can fail.

    Takes images that `sniff` accepts.
    """
    at = 12
    while at + 8 <= len(raw):
        end = at + 8 + struct.unpack_from("<I", raw, at + 4)[0]
        end += end & 1
        if bytes(raw[at : at + 4]) in (b"VP8 ", b"VP8L"):
            body = bytes(raw[at:end])
            return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body
        at = end
    raise _Refused("damaged: a WebP without an image")


# BMP: BITMAPFILEHEADER and BITMAPINFOHEADER


def _bmp(raw: bytes | memoryview) -> Header:
    offset, size = struct.unpack_from("<I I", raw, 10)
    if size < 40:
        raise _Refused(f"unsupported: a BMP with a header of {size} bytes")
    width, height, planes, bits, compression = struct.unpack_from("<iiHHI", raw, 18)
    if planes != 1 or bits not in (1, 4, 8, 16, 24, 32):
        raise _Refused(f"damaged: a BMP of {planes} planes, {bits} bits")
    if compression != 0 or bits == 16:
        raise _Refused(f"unsupported: a BMP of {bits} bits, compression {compression}")
    height = abs(height)  # negative height: top row first
    end = offset + (width * bits + 31) // 32 * 4 * height
    if width > 0 and end > len(raw):
        raise _Refused(f"truncated: a BMP of {end} bytes ends after {len(raw)}")
    return Header(format="bmp", height=height, width=width, mode="palette" if bits <= 8 else "rgb", bits=min(bits, 8))


# TIFF 6.0


_TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
_TIFF_TAGS = frozenset({256, 257, 258, 259, 262, 273, 274, 277, 279, 324, 325, 339})
"""Those that are read here."""
_TIFF_MODES = {(1, 1): "gray", (2, 3): "rgb", (2, 4): "rgba", (3, 1): "palette", (5, 4): "cmyk", (6, 3): "ycbcr"}
_TIFF_COMPRESSIONS = {1: "none", 5: "LZW", 7: "JPEG", 8: "deflate", 32773: "PackBits", 32946: "deflate"}


def _tiff(raw: bytes | memoryview) -> Header:
    order = "<" if raw[0] == 0x49 else ">"
    (at,) = struct.unpack_from(order + "I", raw, 4)
    (count,) = struct.unpack_from(order + "H", raw, at)
    tags: dict[int, tuple[int, ...]] = {}
    for entry in range(at + 2, at + 2 + 12 * count, 12):
        tag, kind, number = struct.unpack_from(order + "HHI", raw, entry)
        if kind not in (3, 4) or tag not in _TIFF_TAGS:
            continue
        if tag in tags:
            raise _Refused(f"damaged: a TIFF that has tag {tag} twice")
        if number > MAX_STRIPS:
            raise _Refused(f"damaged: TIFF tag {tag} has {number} values")
        place = entry + 8
        if number * _TIFF_SIZES[kind] > 4:
            (place,) = struct.unpack_from(order + "I", raw, place)
            if place + number * _TIFF_SIZES[kind] > len(raw):
                raise _Refused(f"truncated: TIFF tag {tag} lies behind the end")
        tags[tag] = struct.unpack_from(f"{order}{number}{'H' if kind == 3 else 'I'}", raw, place)
    if struct.unpack_from(order + "I", raw, at + 2 + 12 * count)[0]:
        raise _Refused("animated: a TIFF of several pages")
    try:
        (width,), (height,), (photometric,) = tags[256], tags[257], tags[262]
        (samples,), (orientation,), (compression,) = tags.get(277, (1,)), tags.get(274, (1,)), tags.get(259, (1,))
        offsets, sizes = (tags[273], tags[279]) if 273 in tags else (tags[324], tags[325])
    except (KeyError, ValueError):
        raise _Refused("damaged: a TIFF that lacks a required tag") from None
    bits = set(tags.get(258, (1,)))
    is_known = (photometric, samples) in _TIFF_MODES and (bits == {8} or (bits == {16} and photometric == 1))
    if not is_known or set(tags.get(339, (1,))) != {1} or orientation != 1:
        raise _Refused(
            f"unsupported: a TIFF of {sorted(bits)} bits, {samples} samples, photometric {photometric}, orientation {orientation}"
        )
    if compression not in _TIFF_COMPRESSIONS:
        raise _Refused(f"unsupported: a TIFF with compression {compression}")
    if len(offsets) != len(sizes) or any(begin + size > len(raw) for begin, size in zip(offsets, sizes, strict=True)):
        raise _Refused("truncated: the TIFF's pixels lie behind its end")
    mode = _TIFF_MODES[photometric, samples]
    return Header(format="tiff", height=height, width=width, mode=mode, bits=max(bits), has_alpha=mode == "rgba")


# GIF: https://www.w3.org/Graphics/GIF/spec-gif89a.txt


def _gif(raw: bytes | memoryview) -> Header:
    if bytes(raw[:6]) not in (b"GIF87a", b"GIF89a"):
        raise _Refused("damaged: a GIF of no known version" if len(raw) >= 6 else "truncated: the header ends in GIF8")
    width, height, flags = struct.unpack_from("<HHB", raw, 6)
    at, frames, transparent = 13 + _gif_colors(flags), 0, False
    for _ in range(MAX_PARTS):
        kind = raw[at]
        if kind == 0x3B:  # the end
            break
        if kind == 0x2C:
            frames += 1
            at = _after_blocks(raw, at + 11 + _gif_colors(raw[at + 9]))
        elif kind == 0x21:
            transparent = transparent or (raw[at + 1] == 0xF9 and bool(raw[at + 3] & 1))
            at = _after_blocks(raw, at + 2)
        else:
            raise _Refused(f"damaged: a GIF with a block of kind {kind}")
    else:
        raise _Refused(f"damaged: a GIF of more than {MAX_PARTS} blocks")
    if frames != 1:
        raise _Refused(f"animated: a GIF of {frames} frames" if frames else "damaged: a GIF without an image")
    return Header(format="gif", height=height, width=width, mode="palette", bits=8, has_alpha=transparent)


def _gif_colors(flags: int) -> int:
    """Bytes of the colour table that these flags announce."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _after_blocks(raw: bytes | memoryview, at: int) -> int:
    """The place behind a GIF's sub-blocks, each preceded by its length. IndexError where they do not end."""
    while size := raw[at]:
        at += 1 + size
    return at + 1


# PNM: https://netpbm.sourceforge.net/doc/


_PNM_FIELD = re.compile(rb"(?:[ \t\r\n]|#[^\r\n]*[\r\n])*([0-9]{1,9})")
_PNM_HEADER_BYTES = 1 << 16


def _pnm(raw: bytes | memoryview) -> Header:
    kind, head = raw[1] - ord("0"), bytes(raw[:_PNM_HEADER_BYTES])
    at, values = 2, []
    for _ in range(2 if kind == 4 else 3):
        found = _PNM_FIELD.match(head, at)
        if found is None:
            raise _Refused("damaged: a PNM without its width, height and depth")
        values.append(int(found[1]))
        at = found.end()
    width, height, most = values if kind != 4 else (*values, 1)
    if kind != 4 and most not in (255, 65535):
        raise _Refused(f"unsupported: a PNM of values up to {most}, not 255 or 65535")
    row = -(-width // 8) if kind == 4 else width * (3 if kind == 6 else 1) * (2 if most > 255 else 1)
    if (end := at + 1 + row * height) > len(raw):
        raise _Refused(f"truncated: a PNM of {end} bytes ends after {len(raw)}")
    return Header(format="pnm", height=height, width=width, mode="rgb" if kind == 6 else "gray", bits={1: 1, 255: 8, 65535: 16}[most])


_READERS = (
    (b"\x89PNG\r\n\x1a\n", _png),
    (b"\xff\xd8\xff", _jpeg),
    (b"RIFF", _webp),
    (b"BM", _bmp),
    (b"II*\0", _tiff),
    (b"MM\0*", _tiff),
    (b"GIF8", _gif),
    (b"P4", _pnm),
    (b"P5", _pnm),
    (b"P6", _pnm),
)

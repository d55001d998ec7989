"""The image formats that are decoded here: how their files are called, and how they begin. One list for the codec, which judges the bytes,
for the sources, which choose the files, and for the commands that take files (`trainer.predict`, `trainer.curve`).

A file is an image if its name says so, or, where the name says nothing, if its first bytes do. Imports nothing of the project but foreign.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from dataio.foreign import open_regular

SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WebP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "PNM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
"""Format -> the suffixes of its files, in lower case."""
ACCEPTED_FORMATS = ", ".join(SUFFIXES)
NOT_DECODED = frozenset(
    """
    .avif .heic .heif .hif .ico .j2k .jp2 .jpf .jpx .jxl .psd .svg .tga
    .arw .cr2 .cr3 .dng .nef .nrw .orf .pef .raf .raw .rw2 .srw
    """.split()  # noqa: SIM905 (a list of them fills the page)
)
"""Suffixes of images that nothing here decodes; a camera's raw files begin like a TIFF."""
JUNK = frozenset({"@eadir", "__macosx", "#recycle", "$recycle.bin", "system volume information", "lost+found", "thumbs.db", "desktop.ini"})
"""Folders and files that systems leave behind, in lower case: thumbnails, resource forks, deleted files."""
START_BYTES = 32
"""Of a file, enough to tell its format."""
_NO_IMAGES = frozenset(
    """
    .csv .tsv .txt .md .rst .json .jsonl .xml .yaml .yml .toml .html .htm .py .ipynb .log .ini .cfg .db .sqlite .npy .npz .mat .pkl .pt .pth
    .zip .gz .tar .tgz .bz2 .xz .7z .rar .pdf .doc .docx .xls .xlsx .mp3 .mp4 .wav .avi .mov .mkv .parquet .h5 .hdf5
    """.split()  # noqa: SIM905
)
"""Names that say something else: such files are not opened."""
_BY_SUFFIX = frozenset(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
_PNM = re.compile(rb"P[456][ \t\r\n]")


def is_image_file(path: Path) -> bool:
    """Whether a file is to be read as an image: by its suffix, else by its first bytes (`0`, `x.jpg_large`, `x.jpeg~`)."""
    suffix = path.suffix.lower()
    if suffix in _BY_SUFFIX:
        return True
    if suffix in NOT_DECODED or suffix in _NO_IMAGES:
        return False
    try:
        with open_regular(path) as file:
            return begins_like_image(file.read(START_BYTES))
    except OSError:
        return False


def begins_like_image(start: bytes) -> bool:
    """Whether these first START_BYTES of a file are those of a format that is decoded here."""
    if start.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"GIF87a", b"GIF89a")):
        return True
    if start.startswith(b"RIFF"):
        return start[8:12] == b"WEBP"
    if start.startswith(b"BM"):  # two letters begin many texts: the four reserved bytes and the header's length must be a BMP's too
        return start[6:10] == bytes(4) and start[14:15] in (b"\x28", b"\x34", b"\x38", b"\x40", b"\x6c", b"\x7c")
    return _PNM.match(start) is not None


def images_below(folder: str) -> Iterator[str]:
    """The images that a data set of this folder would have, in any order."""
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name.lower() not in JUNK]
        for name in names:
            if not name.startswith(".") and name.lower() not in JUNK and is_image_file(Path(where, name)):
                yield os.path.join(where, name)

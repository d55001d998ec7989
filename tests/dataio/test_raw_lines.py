"""No line that a C library prints itself reaches the terminal of a command; all other lines do. Real libraries, real commands' output."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataio.raw_lines import without_image_libraries

PROJECT = Path(__file__).resolve().parents[2]
PRINTS = """
import ctypes, os, sys
import dataio.terminal
from dataio.raw_lines import kept_off
libc = ctypes.CDLL(None)
libc.fputs.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
def say(text):
    libc.fputs(text, ctypes.c_void_p.in_dll(libc, "stderr"))
if sys.argv[1] == "command":
    dataio.terminal.prepare_output()
say(b"before\\n")
for _ in range(2):
    with kept_off(), kept_off():
        say(b"libpng warning: iCCP: known incorrect sRGB profile\\nother: words\\n")
        print("python", file=sys.stderr, flush=True)
        os.system("echo child >&2")
say(b"libpng warning: after\\n")
"""


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*, warns: bool = False, is_damaged: bool = False) -> bytes:
    """A PNG that libpng prints a warning of (a broken ICC profile) or an error (a filter that does not exist)."""
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(out, "PNG")
    data = out.getvalue()
    if warns:
        data = data[:33] + chunk(b"iCCP", b"icc\0\0" + zlib.compress(b"garbage" * 20)) + data[33:]
    if is_damaged:
        where = data.index(b"IDAT")
        length = int.from_bytes(data[where - 4 : where], "big")
        rows = bytearray(zlib.decompress(data[where + 4 : where + 4 + length]))
        rows[0] = 9  # no filter has this number
        data = data[: where - 4] + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return data


def printed(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], cwd=PROJECT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_only_lines_of_image_libraries_are_dropped() -> None:
    text = b"libpng error: IDAT: CRC error\nlibpng is a library\nCorrupt JPEG data: 3 extraneous bytes\nterminate called\nlast"
    assert without_image_libraries(text) == b"libpng is a library\nterminate called\nlast"


def test_python_and_child_processes_write_where_they_always_do_and_other_libraries_are_passed_on() -> None:
    once = ["python", "child", "other: words"]
    assert printed("-c", PRINTS, "command").splitlines() == ["before", *once, *once, "libpng warning: after"]


def test_a_process_that_is_no_command_keeps_every_line() -> None:
    assert printed("-c", PRINTS, "rank").count("libpng warning: iCCP") == 2


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in ("ant", "bee"):
        for number in range(8):
            path = tmp_path / "images" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(warns=True, is_damaged=name == "bee" and number == 3))
    return tmp_path / "images"


def test_a_conversion_names_the_damaged_image_and_shows_no_line_of_libpng(images: Path, tmp_path: Path) -> None:
    said = printed("-m", "dataio.convert", str(images), str(tmp_path / "out"), "--max-bad-fraction", "0.5")
    assert "libpng" not in said
    assert "bee/3.png" in (tmp_path / "out" / "quarantine.jsonl").read_text()


def test_libpng_would_print_both(images: Path) -> None:
    """Else the test above shows nothing."""
    decode = (
        "import sys; from dataio.codecs.image.decode import Checker; "
        "Checker(max_pixels=10**6).check([open(p, 'rb').read() for p in sys.argv[1:]])"
    )
    said = printed("-c", decode, str(images / "ant" / "0.png"), str(images / "bee" / "3.png"))
    assert "libpng warning: iCCP" in said
    assert "libpng error: bad adaptive filter value" in said

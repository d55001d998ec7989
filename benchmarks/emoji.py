"""Real images with several kinds of labels: Google's 3,786 emoji of 64 pixels (Noto Emoji, Apache-2.0), from the npm package
emoji-datasource-google 16.0.0 (74 MB, pinned by hash; the package is MIT).

    python -m benchmarks.emoji FOLDER

writes FOLDER/labels.csv and FOLDER/images/*.png, the input of `--data.path FOLDER/labels.csv --data.targets ...`. The columns:

- `image`: the file, relative to the table.
- `category` (10 classes) and `subcategory` (those with at least 20 images; empty elsewhere, which means unknown): one label.
- `traits`: any number of labels or none, from the code points: five skin tones, woman, man, facing right.
- `version`: the version of Unicode Emoji that introduced it, a number.
"""

import argparse
import csv
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

PACKAGE, VERSION = "emoji-datasource-google", "16.0.0"
SHA256 = "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
FEWEST = 20
"""Images that a subcategory needs to count as one."""
COLUMNS = ("image", "category", "subcategory", "traits", "version")
TRAITS: Mapping[str, frozenset[str]] = {
    "light skin": frozenset({"1F3FB"}),
    "medium-light skin": frozenset({"1F3FC"}),
    "medium skin": frozenset({"1F3FD"}),
    "medium-dark skin": frozenset({"1F3FE"}),
    "dark skin": frozenset({"1F3FF"}),
    "woman": frozenset({"1F469", "2640"}),
    "man": frozenset({"1F468", "2642"}),
    "facing right": frozenset({"27A1"}),
}
"""Name -> code points; each of them means that a person in the picture has this trait."""


def prepare(folder: Path) -> Path:
    """The path of the table, made if it is missing; its images lie next to it. OSError if the package cannot be downloaded."""
    table = folder / "labels.csv"
    if table.is_file():
        return table
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(_package())) as archive:
        described = json.loads(_read(archive, "package/emoji.json"))
        rows = list(_rows(described))
        for row in rows:
            name = Path(row["image"]).name
            (folder / "images" / name).write_bytes(_read(archive, f"package/img/google/64/{name}"))
    common = {name for name, count in Counter(row["subcategory"] for row in rows).items() if count >= FEWEST}
    with (folder / "labels.csv.part").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({**row, "subcategory": row["subcategory"] if row["subcategory"] in common else ""} for row in rows)
    (folder / "labels.csv.part").rename(table)
    return table


def _package() -> bytes:
    """The package's archive, checked against its hash."""
    npm = shutil.which("npm")
    if npm is None:
        raise OSError(f"npm is not installed, which fetches {PACKAGE} {VERSION}; install it (Debian: apt-get install npm)")
    with TemporaryDirectory() as folder:
        done = subprocess.run([npm, "pack", f"{PACKAGE}@{VERSION}", "--silent"], cwd=folder, capture_output=True, text=True, timeout=300)
        found = list(Path(folder).glob("*.tgz"))
        if done.returncode or len(found) != 1:
            raise OSError(f"npm could not fetch {PACKAGE} {VERSION}: {done.stderr.strip()[-200:] or 'no file came'}")
        data = found[0].read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHA256:
        raise OSError(f"{PACKAGE} {VERSION} has the SHA-256 {digest[:16]}..., not {SHA256[:16]}...: it is not the package that was checked")
    return data


def _rows(described: list[dict[str, Any]]) -> Iterator[dict[str, str]]:
    """Yields a row for each picture: an emoji, and each of its skin tones."""
    for emoji in described:
        for one in (emoji, *(emoji.get("skin_variations") or {}).values()):
            if one["has_img_google"]:
                points = set(one["unified"].split("-"))
                is_person = emoji["category"] == "People & Body"
                yield {
                    "image": f"images/{one['image']}",
                    "category": emoji["category"],
                    "subcategory": emoji["subcategory"],
                    "traits": "|".join(name for name, signs in TRAITS.items() if is_person and signs & points),
                    "version": one["added_in"],
                }


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise OSError(f"{PACKAGE} {VERSION} has no {name}")
    return file.read()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.emoji", description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder", type=Path)
    try:
        print(prepare(parser.parse_args().folder))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

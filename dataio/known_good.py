"""What earlier conversions of a source have found good, so that the same files with another split are not decoded again. Called by convert.

A conversion decodes each image to see that it can be. That takes most of its time, and depends on nothing but the image's bytes and the
rules of what is usable: so a sample with the SHA-256 of one that was good by the same rules is good. Its header is still looked at, as
`data.max_image_pixels` may be another. Bad samples are few, and are decoded again.
"""

from collections.abc import Set
from pathlib import Path

from dataio.foreign import MAX_SETTINGS_BYTES, read_regular
from dataio.parquet import open_dataset

RULES_NAME = "rules.txt"
"""File in a converted folder: the rules by which its samples were found good. Folders of earlier versions have none, and are not used."""


def known_good(root: Path, kind: str, origin: str, *, rules: str, origin_name: str) -> Set[bytes]:
    """The SHA-256 of all samples in conversions of the source at path `origin`, of this kind, below `root`, that were made by these
    rules. What cannot be read is not used."""
    found: set[bytes] = set()
    try:
        folders = sorted(root.glob(f"{kind}-*"))
    except OSError:
        return found
    for folder in folders:
        try:
            if _said(folder / origin_name) != origin or _said(folder / RULES_NAME) != rules:
                continue
            dataset = open_dataset(folder)
            found.update(sha256 for name in dataset.manifest.splits for sha256 in dataset.split(name).hashes())
        except (OSError, ValueError):
            continue
    return found


def _said(path: Path) -> str:
    return read_regular(path, MAX_SETTINGS_BYTES).decode(errors="backslashreplace").strip()

"""Takes a run's list of targets back, so that Prometheus stops asking for processes that are gone. targets.py calls it at a run's end,
reaper.py where the driver was killed. The standard library only.

The list may be another driver's by then: it goes only if it still names the address of the coordinator that wrote it."""

import contextlib
import glob
import json
import os

NOTE = "targets-note.json"
"""File in the coordinator's private folder: {"file": the list, "address": the coordinator's}."""


def is_of_another(path: str, address: str) -> bool:
    """Whether the list at `path` names processes, and `address` is none of them."""
    addresses = _addresses(path)
    return bool(addresses) and address not in addresses


def take_back(path: str, address: str) -> None:
    """Empty the list at `path` if `address` is in it."""
    if address in _addresses(path):
        temporary = f"{path}.{os.getpid()}.tmp"
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write("[]")
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _addresses(path: str) -> list[str]:
    """Empty for what is no list or not there."""
    try:
        with open(path, encoding="utf-8") as file:
            return [address for target in json.load(file) for address in target["targets"]]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def take_back_noted(folder: str) -> None:
    """Empty the lists of the coordinators whose private folders are in `folder`, a dead driver's."""
    for note in glob.glob(f"{glob.escape(folder)}/*/{NOTE}"):
        try:
            with open(note, encoding="utf-8") as file:
                noted = json.load(file)
            take_back(str(noted["file"]), str(noted["address"]))
        except (OSError, ValueError, TypeError, KeyError):
            continue

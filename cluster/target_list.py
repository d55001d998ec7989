"""Takes a run's list of targets back, so that Prometheus stops asking for processes that are gone. targets.py calls it at a run's end,
reaper.py where the driver was killed. The standard library only.

The list may be another driver's by then: it goes only if it still names the address of the coordinator that wrote it."""

import contextlib
import glob
import json
import os

NOTE = "targets-note.json"
"""File in the coordinator's private folder: {"file": the list, "address": the coordinator's}."""


def take_back(path: str, address: str) -> None:
    """Empty the list at `path` if `address` is in it."""
    try:
        with open(path, encoding="utf-8") as file:
            listed = json.load(file)
        is_ours = any(address in target["targets"] for target in listed)
    except (OSError, ValueError, TypeError, KeyError):
        return
    if is_ours:
        temporary = f"{path}.{os.getpid()}.tmp"
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write("[]")
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def take_back_noted(folder: str) -> None:
    """Empty the lists of the coordinators whose private folders are in `folder`, a dead driver's."""
    for note in glob.glob(f"{glob.escape(folder)}/*/{NOTE}"):
        try:
            with open(note, encoding="utf-8") as file:
                noted = json.load(file)
            take_back(str(noted["file"]), str(noted["address"]))
        except (OSError, ValueError, TypeError, KeyError):
            continue

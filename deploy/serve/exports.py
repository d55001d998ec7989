"""Opens an ONNX export that `finetune export` wrote: reads and checks its manifest, verifies the model by its SHA-256. Called by `app`,
which looks at the manifest alone, by the command line, and by `predictor`, which opens the model.

The folder may be anyone's: nothing is parsed that was not hashed, and no file outside of it is read.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.storage import join_uri, open_storage
from cluster.text import address, shown
from dataio.codecs.text.form import TOKENIZER_FILE
from dataio.foreign import json_of
from dataio.schema import Target, fault_of_targets
from trainer.formats.manifest import FORMAT_VERSION, MANIFEST_FILE
from trainer.formats.onnx_graph import LARGEST_BYTES

MOST_MANIFEST_BYTES = 64 << 20
FILTERS = ("bilinear", "bicubic", "nearest")
AGAIN = "export the run again (`finetune export RUN`)"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""Of a model of texts, by their usual names (trainer.formats.texts)."""
_PUBLIC = ("of", "format", "file", "files", "input", "output", "classes", "targets", "temperatures", "compared")


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """An export's manifest, checked."""

    folder: str
    """Where it lies, as the user may see it: without secrets."""
    location: str
    manifest: Mapping[str, Any]
    targets: tuple[Target, ...]

    @property
    def file(self) -> str:
        return str(self.manifest["file"])

    @property
    def takes_texts(self) -> bool:
        return "tokenizer" in self.manifest["input"]

    @property
    def sha256(self) -> str:
        """Of the model's file."""
        return str(self.manifest["files"][self.file]["sha256"])

    def public(self) -> dict[str, Any]:
        """The manifest's part that clients get."""
        return {key: self.manifest[key] for key in _PUBLIC if key in self.manifest}


def open_export(location: str) -> Export:
    """Read the manifest. ValueError for what is no ONNX export, for a part of one, and for one that cannot be served exactly."""
    folder = address(location)
    try:
        text = _read(location, MANIFEST_FILE, MOST_MANIFEST_BYTES)
    except FileNotFoundError:
        raise ValueError(
            f"{folder} is no export: there is no {MANIFEST_FILE} in it, which is written last; give the folder that `finetune export`"
            " names, such as exports/onnx in the run's folder"
        ) from None
    try:
        manifest = json_of(text)
        if not isinstance(manifest, dict):
            raise ValueError("it is no JSON object")
    except ValueError as error:
        raise ValueError(f"{folder}/{MANIFEST_FILE} is damaged ({shown(error)}); {AGAIN}") from None
    if manifest.get("manifest_version") != FORMAT_VERSION:
        raise ValueError(
            f"{folder}/{MANIFEST_FILE} has the version {shown(manifest.get('manifest_version'))}, and this program reads {FORMAT_VERSION}; "
            "use the version of the program that wrote it, or export the run again"
        )
    if manifest.get("format") != "onnx":
        raise ValueError(
            f"{folder} has the format {shown(manifest.get('format'))}, and only onnx is served; export the run with --to onnx "
            "and give that folder"
        )
    try:
        targets = _targets(manifest)
        _check_files(manifest)
        if "tokenizer" in manifest["input"]:
            _check_texts(manifest)
        else:
            _check_images(manifest["input"])
    except _Unservable as error:
        raise ValueError(f"{folder}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder}/{MANIFEST_FILE} is damaged ({type(error).__name__}: {shown(error)}); {AGAIN}") from None
    return Export(folder=folder, location=location, manifest=manifest, targets=targets)


def read_model(export: Export) -> bytes:
    """The model's file, verified by the manifest's SHA-256. ValueError if it is missing or is another one."""
    return read_beside(export, export.file)


def read_beside(export: Export, name: str) -> bytes:
    """A file that the manifest names, verified by its SHA-256. ValueError if it is missing or is another one."""
    where, sha256 = f"{export.folder}/{name}", str(export.manifest["files"][name]["sha256"])
    try:
        data = _read(export.location, name, LARGEST_BYTES)
    except FileNotFoundError:
        raise ValueError(f"{where} is missing, which the manifest names; copy the whole folder, or {AGAIN}") from None
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{where} is damaged or another file: its SHA-256 is {found[:16]}..., the manifest says {shown(sha256)[:16]}...; "
            f"copy the whole folder, or {AGAIN}"
        )
    return data


class _Unservable(Exception):
    """An export that is whole, and that cannot be served."""


def _read(location: str, name: str, most_bytes: int) -> bytes:
    pieces, size = [], 0
    for piece in open_storage(location).read_chunks(name):
        pieces.append(piece)
        if (size := size + len(piece)) > most_bytes:
            raise ValueError(f"{address(join_uri(location, name))} has more than {most_bytes:,} bytes, the most that is read; {AGAIN}")
    return b"".join(pieces)


def _targets(manifest: Mapping[str, Any]) -> tuple[Target, ...]:
    told = manifest["targets"]
    targets = tuple(
        Target(
            name=each["name"],
            kind=each["kind"],
            classes=tuple(each["classes"]),
            mean=float(each.get("mean", 0.0)),
            std=float(each.get("std", 1.0)),
        )
        for each in told
    )
    if fault := fault_of_targets(targets):
        raise ValueError(fault)
    if any("outputs" not in each for each in told):
        raise _Unservable(
            "the model's task is one of its own, whose outputs no manifest explains; serve it by a program of yours, as README.md in the "
            "export shows"
        )
    ends = [0, *(each["outputs"][1] for each in told)]
    if [each["outputs"][0] for each in told] != ends[:-1] or ends[-1] != manifest["output"]["shape"][1]:
        raise ValueError("the targets' outputs do not follow each other")
    return targets


def _check_files(manifest: Mapping[str, Any]) -> None:
    name, digest = manifest["file"], manifest["files"][manifest["file"]]["sha256"]
    if not isinstance(name, str) or "/" in name or name in ("", ".", ".."):
        raise ValueError("file is no name")
    if not isinstance(digest, str):
        raise ValueError("sha256 is no text")
    if not 0 < float(manifest.get("threshold", 0.5)) < 1:
        raise ValueError("threshold is no number between 0 and 1")
    temperatures = manifest["temperatures"].values()
    if not all(isinstance(value, int | float) and 0 < value < float("inf") for value in temperatures):
        raise ValueError("a temperature is no number above 0")


def _check_texts(manifest: Mapping[str, Any]) -> None:
    takes = manifest["input"]
    if not isinstance(manifest["files"][takes["tokenizer"]]["sha256"], str) or takes["tokenizer"] != TOKENIZER_FILE:
        raise ValueError(f"tokenizer is not {TOKENIZER_FILE}")
    if takes["names"] not in (list(INPUTS[:2]), list(INPUTS)):
        raise ValueError(f"names are not {', '.join(INPUTS)}, with or without the last")
    for name, least in (("max_tokens", 1), ("pad_token_id", 0)):
        if not isinstance(takes[name], int) or takes[name] < least:
            raise ValueError(f"{name} is no number from {least} up")
    if takes["too_long"] not in ("cut", "refuse"):
        raise ValueError("too_long is neither cut nor refuse")


def _check_images(takes: Mapping[str, Any]) -> None:
    height, width = takes["decoded_to"]
    if not all(isinstance(side, int) and side > 0 for side in (height, width)):
        raise ValueError("decoded_to is no size")
    if takes["prepared"] == "in the graph":
        return
    if len(takes["mean"]) != 3 or len(takes["std"]) != 3 or min(takes["std"]) <= 0:
        raise ValueError("mean and std are not three numbers")
    if "resized_to" in takes:
        sees_height, sees_width = takes["resized_to"]
        if "resized_by" not in takes:  # of a release before it was told
            raise _Unservable(
                f"images are to be resized to {sees_width}x{sees_height} before the graph sees them, and the manifest does not say by which"
                " filter; export the run again"
            )
        if takes["resized_by"] not in FILTERS or sees_height != sees_width or not isinstance(sees_width, int) or sees_width < 1:
            raise ValueError(f"resized_to and resized_by are no square and one of {', '.join(FILTERS)}")

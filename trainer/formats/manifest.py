"""What is written beside a model in another format: `manifest.json`, for programs, and `README.md`, for people. The manifest is written
last and holds the SHA-256 of the model's files, so a reader sees a whole export or knows that it does not. Called by the command line.
"""

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

from cluster.storage import Storage, join_uri
from cluster.text import json_line
from trainer.export.model_folder import Exported, output_names, outputs_of
from trainer.formats.check import Compared
from trainer.formats.made import BATCH, Made
from trainer.runs.model_files import takes_texts
from trainer.settings.units import number, percent, size
from trainer.tasks.info import Measure
from trainer.tasks.task import Task

MANIFEST_FILE, CARD_FILE = "manifest.json", "README.md"
FORMAT_VERSION = 1
_PACKAGES = ("torch", "torchvision", "timm", "transformers", "tokenizers", "onnx", "onnxruntime", "onnxscript", "ray-finetune")


def manifest_of(
    made: Made,
    compared: Compared,
    exported: Exported,
    description: Mapping[str, Any],
    *,
    run: str,
    model_sha256: str,
    outputs: int,
) -> dict[str, Any]:
    """The content of manifest.json. `description`: the model folder's config.json."""
    headline = exported.task.info.headline
    names = output_names(exported.task)
    return {
        "manifest_version": FORMAT_VERSION,
        "format": made.format,
        "file": made.main,
        "files": {name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in made.files.items()},
        "of": {"run": run, "model_sha256": model_sha256},
        "input": input_of(made.takes, description),
        "output": {"name": made.output, "shape": [BATCH, outputs], "type": "float32", "meaning": "before softmax or sigmoid"},
        **({"classes": names} if names is not None else {}),
        "targets": targets_of(exported.task, outputs),
        **({"threshold": description["task"]["threshold"]} if any(each.kind == "labels" for each in exported.task.targets) else {}),
        "temperatures": {name: temperature.value for name, temperature in exported.temperatures.items()},
        **made.about,
        "compared": compared.to_json(headline.name),
        "versions": dict(_versions()),
    }


def input_of(takes: Mapping[str, Any], description: Mapping[str, Any]) -> dict[str, Any]:
    """What the model takes, with what only the run's settings say: the filter of a resizing, and the limit of an image."""
    if takes_texts(description):
        return dict(takes)
    resized = {"resized_by": description["model"]["interpolation"]} if "resized_to" in takes else {}
    return {**takes, **resized, "max_image_pixels": description["max_image_pixels"]}


def targets_of(task: Task, outputs: int) -> list[dict[str, Any]]:
    """What each output means: of each target its outputs, as [first, after the last]; of a number also how it comes to its own unit. A task
    of the user's own may have outputs that are no target's: then they are not told apart."""
    counts = [len(target.classes) or 1 for target in task.targets]
    is_known = sum(counts) == outputs
    found, first = [], 0
    for target, count in zip(task.targets, counts, strict=True):
        told: dict[str, Any] = {"name": target.name, "kind": target.kind, "classes": list(target.classes)}
        if is_known:
            told["outputs"] = [first, first + count]
        if target.kind == "number":
            told |= {"mean": target.mean, "std": target.std or 1.0, "formula": "output * std + mean"}
        found.append(told)
        first += count
    return found


def write(storage: Storage, folder: str, made: Made, manifest: Mapping[str, Any], card: str) -> str:
    """Write the files of an export, the manifest last. Returns its location. An export that was there is unreadable from the first file on
    until the manifest is there: it is taken away first."""
    if storage.exists(f"{folder}/{MANIFEST_FILE}"):
        storage.delete_file(f"{folder}/{MANIFEST_FILE}")
    for name, data in made.files.items():
        storage.write_atomic(f"{folder}/{name}", data)
    storage.write_atomic(f"{folder}/{CARD_FILE}", card.encode())
    storage.write_atomic(f"{folder}/{MANIFEST_FILE}", (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())
    return join_uri(storage.uri, folder)


def card_of(made: Made, compared: Compared, exported: Exported, *, run: str) -> str:
    """README.md: what the files are, what they were compared with, how to ask them."""
    return "\n".join(
        [
            f"# {run} as {made.format}",
            "",
            f"`{made.main}`, {size(sum(map(len, made.files.values())))}. {'; '.join(in_words(compared, exported.task.info.headline))}.",
            "",
            "## Use",
            "",
            "```python",
            *made.code,
            "```",
            "",
            *(f"- {line}" for line in _input_in_words(made.takes)),
            "",
            "## Outputs",
            "",
            *_outputs(exported),
            f"All of this is in `{MANIFEST_FILE}` too, for programs.",
            "",
        ]
    )


def in_words(compared: Compared, headline: Measure) -> Iterator[str]:
    """What a comparison found, in parts of a sentence."""
    unit = f"{number(compared.samples)} {compared.unit} of the {compared.split} split"
    if compared.changed is not None:
        same = f"all answers are the model's on {unit}"
        yield f"{number(compared.changed)} of the answers on {unit} are not the model's" if compared.changed else same
    yield f"outputs{'' if compared.changed is not None else f' on {unit}'} differ by {compared.largest_difference:.2g} of the largest"
    value, own = compared.result.measures[headline.name], compared.own.measures[headline.name]
    if headline.unit == "ratio":
        low, high = compared.drop or (0.0, 0.0)
        interval = f" (lost: {100 * (own - value):.2f} points, 95 % interval {100 * low:.1f} to {100 * high:.1f})" if compared.drop else ""
        yield f"{headline.in_words} {percent(value, 2)}, the model's own {percent(own, 2)}{interval}"
    else:
        yield f"{headline.in_words} {value:.4g}, the model's own {own:.4g}"


def _input_in_words(takes: Mapping[str, Any]) -> Iterator[str]:
    if "tokenizer" in takes:
        names = " and ".join(f"`{name}`" for name in takes["names"])
        yield f"{names} are (n, tokens) int64, of any n and of up to {takes['max_tokens']} tokens."
        yield f"`{takes['tokenizer']}` makes them of texts: it cuts those that are longer, and pads the others to the longest."
        if takes["too_long"] == "refuse":
            yield "No text that was cut was trained on (`--data.too-long refuse`): refuse longer ones too."
        yield "transformers opens the tokenizer and the names of the classes by this folder: `AutoTokenizer`, `AutoConfig`."
        return
    height, width = takes["decoded_to"]
    _, _, rows, columns = takes["shape"]
    yield f"An image is decoded to RGB and brought to {width}x{height} pixels (`fit`: {takes['fit']})."
    if takes["prepared"] == "in the graph":
        yield f"`images` is (n, 3, {height}, {width}) uint8: the pixels as they are. Resizing and normalising are in the graph."
        return
    if "resized_to" in takes:
        yield "It is then resized to {1}x{0} pixels, by the filter that `resized_by` names, with antialiasing.".format(*takes["resized_to"])
    yield f"Each pixel becomes {takes['formula']}, with mean {takes['mean']} and std {takes['std']} for red, green, blue."
    if "enlarged" in takes:
        yield f"It is then enlarged {takes['enlarged']['times']} times ({takes['enlarged']['by']})."
    yield f"`images` is (n, 3, {rows}, {columns}) float32."


def _outputs(exported: Exported) -> Iterator[str]:
    for target in targets_of(exported.task, outputs_of(exported.task)):
        named = target["name"].replace("`", "'")
        first, after = target.get("outputs", (0, 0))
        where = f", outputs {first} to {after - 1}" if after else ""
        if target["classes"]:
            what = "labels (a sigmoid each)" if target["kind"] == "labels" else "classes (a softmax over all)"
            # Names come from the data. As JSON in a code block, with the closing character escaped, they stay plain text.
            names = json_line(target["classes"]).replace("`", "\\u0060")
            yield from (f"`{named}`{where}: {what}", "", "```json", names, "```", "")
        else:
            yield from (f"`{named}`{where}: a number, output * {target['std']:g} + {target['mean']:g}", "")
    for name, temperature in exported.temperatures.items():
        of = f" of `{name.replace('`', chr(39))}`" if len(exported.temperatures) > 1 else ""
        yield f"Divide the outputs{of} by {temperature.value:g} before the softmax or sigmoid, for probabilities that can be believed."
        yield ""


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    for name in _PACKAGES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue

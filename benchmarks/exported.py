"""What a finished run's model costs in other formats: size, accuracy, milliseconds for a batch of 1 and of 32 (median and 99th percentile).

    python -m benchmarks.exported RUN [--threads 1] [--rounds 100] [--json] [--out FILE]

`finetune export` writes the model as ONNX and as int8, and compares both with the model on the whole test set. Then the network itself
(eager PyTorch, float32, of images channels_last), ONNX Runtime and ONNX Runtime in int8 answer the same prepared images, or texts of as
many tokens as there may be, in turns, in one process, with the same number of threads. RUN is a finished run, such as the ones that `make
run` and `make run-text` leave.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.common import add_arguments, described, finish, interleave, parser_of, target
from trainer.export.model_folder import load_export
from trainer.formats.__main__ import INT8
from trainer.formats.__main__ import main as export
from trainer.formats.made import INPUT, ONNX_FILE
from trainer.formats.onnx_graph import session_of
from trainer.runs.model_files import find_model

BATCHES = (1, 32)
SIZE_GOAL, DROP_GOAL_POINTS = 0.35, 1.0
_COMMON_TOKENS = 20
"""Every vocabulary has so many."""
CASES = ("PyTorch", "onnx", INT8)

Inputs = Mapping[str, npt.NDArray[Any]]
Ask = Callable[[Inputs], object]


def main() -> int:
    parser = parser_of("exported", __doc__)
    parser.add_argument("run", help="a finished run's folder")
    parser.add_argument("--threads", type=int, default=1, help="for each case (%(default)s)")
    parser.add_argument("--rounds", type=int, default=100, help="of each case and batch (%(default)s)")
    add_arguments(parser)
    options = parser.parse_args()
    result = described("exported", options) | measure(options)
    return finish(result, options, table(result))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="finetune-exported-") as scratch:
        out = Path(scratch)
        status = export([options.run, "--int8", "--out", scratch, "--max-drop", "100"])
        if status:
            raise RuntimeError(f"the export ended with {status}")
        manifests = {name: json.loads((out / name / "manifest.json").read_text()) for name in ("onnx", INT8)}
        found = load_export(find_model(options.run), torch.device("cpu"), may_be_of_texts=True)
        asks = cases(found.model, {name: (out / name / ONNX_FILE).read_bytes() for name in manifests}, options.threads)
    takes = manifests["onnx"]["input"]
    milliseconds = {str(batch): timed(asks, inputs_of(takes, batch), options.rounds) for batch in BATCHES}
    bytes_of = {name: manifest["files"][ONNX_FILE]["bytes"] for name, manifest in manifests.items()}
    compared = {name: manifest["compared"] for name, manifest in manifests.items()}
    low, high = compared[INT8]["accuracy_lost_95_percent"]
    lost = compared[INT8]["accuracy_of_the_model"] - compared[INT8]["accuracy"]
    faster = {batch: rows["onnx"]["median"] / rows[INT8]["median"] for batch, rows in milliseconds.items()}
    return {
        "threads": options.threads,
        "rounds": options.rounds,
        "input_shape": [takes["max_tokens"]] if "tokenizer" in takes else takes["shape"][1:],
        "bytes": bytes_of,
        "compared": compared,
        "milliseconds": milliseconds,
        "targets": [
            target("answers of the ONNX graph that are not the model's", compared["onnx"]["answers_changed"], at_most=0),
            target("points of accuracy lost to int8", 100 * lost, at_most=DROP_GOAL_POINTS, interval=(100 * low, 100 * high)),
            target("size of int8 over that of float32", bytes_of[INT8] / bytes_of["onnx"], at_most=SIZE_GOAL),
            target("times as fast in int8 at batch 1, ONNX Runtime", faster["1"], at_least=1.0),
        ],
    }


def cases(model: torch.nn.Module, graphs: Mapping[str, bytes], threads: int) -> dict[str, Ask]:
    """A function for each case, from a prepared batch."""

    def eager(inputs: Inputs) -> object:
        given = {name: torch.from_numpy(each) for name, each in inputs.items()}
        with torch.inference_mode():
            if INPUT in given:
                return model(given[INPUT].contiguous(memory_format=torch.channels_last))
            return model.answer(**given)  # type: ignore[operator]

    def of_graph(data: bytes) -> Ask:
        session = session_of(data, threads)
        return lambda inputs: session.run(None, dict(inputs))

    return {"PyTorch": eager, **{name: of_graph(data) for name, data in graphs.items()}}


def inputs_of(takes: Mapping[str, Any], batch: int) -> Inputs:
    """A batch of noise as the manifest's input asks for it."""
    draw = np.random.default_rng(0)
    if "tokenizer" not in takes:
        return {takes["name"]: draw.standard_normal((batch, *takes["shape"][1:]), dtype=np.float32)}
    shape = (batch, takes["max_tokens"])
    ids = draw.integers(0, _COMMON_TOKENS, shape)  # the network's time does not depend on which
    return {name: ids if name == "input_ids" else np.full(shape, int(name == "attention_mask")) for name in takes["names"]}


def timed(asks: Mapping[str, Ask], inputs: Inputs, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each case, in turns."""
    for ask in asks.values():
        for _ in range(3):
            ask(inputs)
    taken: dict[str, list[float]] = {name: [] for name in asks}
    for _, name in interleave(list(asks), rounds):
        begin = time.perf_counter()
        asks[name](inputs)
        taken[name].append(1e3 * (time.perf_counter() - begin))
    return {
        name: {"median": statistics.median(values), "p99": float(np.quantile(values, 0.99)), "least": min(values)}
        for name, values in taken.items()
    }


def table(result: Mapping[str, Any]) -> list[str]:
    lines = [f"{'':10} {'MB':>7} {'accuracy':>9}" + "".join(f"{f'ms, batch {batch}':>16}{'p99':>9}" for batch in BATCHES)]
    for name in CASES:
        megabytes = f"{result['bytes'][name] / 1e6:.2f}" if name in result["bytes"] else ""
        compared = result["compared"].get(name)
        accuracy = compared["accuracy"] if compared else result["compared"]["onnx"]["accuracy_of_the_model"]
        times = [result["milliseconds"][str(batch)][name] for batch in BATCHES]
        lines.append(
            f"{name:10} {megabytes:>7} {100 * accuracy:>8.2f}%" + "".join(f"{row['median']:>16.2f}{row['p99']:>9.2f}" for row in times)
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())

"""What one ONNX file costs on this CPU, as a process of its own: `python -m trainer.compress.latency FILE THREADS CALLS SIDE...` prints one
line of JSON. measure.py starts it. It loads ONNX Runtime and nothing else of weight, so that its memory is the model's.
"""

from dataio.leaving import Leaving
from dataio.terminal import prepare_output

if __name__ == "__main__":
    leaving = Leaving()
    prepare_output()

import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.settings.say import say_json

BATCHES = (1, 32)
_WARM_UPS = 3


def main(argv: Sequence[str]) -> int:
    """Always 0. `argv`: the file, threads, calls of each batch, and (channels, height, width) of an image."""
    file, threads, calls, *shape = argv
    import onnxruntime

    before = _kilobytes("VmRSS")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = int(threads), 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    seconds = {str(batch): _timed(session, (batch, *map(int, shape)), int(calls)) for batch in BATCHES}
    peak = 1024 * (_kilobytes("VmHWM") - before)
    say_json({"seconds": seconds, "peak_bytes": peak})
    return 0


def _timed(session: Any, shape: tuple[int, ...], calls: int) -> list[float]:
    name = session.get_inputs()[0].name
    images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    taken = []
    for _ in range(_WARM_UPS + calls):
        begin = time.perf_counter()
        session.run(None, {name: images})
        taken.append(time.perf_counter() - begin)
    return taken[_WARM_UPS:]


def _kilobytes(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(f"{field}:"))


if __name__ == "__main__":
    leaving.by(lambda: main(sys.argv[1:]))

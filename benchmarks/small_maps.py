"""Convolutions on small maps as matrix products against oneDNN's own kernels: layer by layer, and in a whole step.

    python -m benchmarks.small_maps [--threads 2] [--batch-sizes 16,50,100,256] [--rounds 7] [--json] [--out FILE]

This measurement is the basis of the rules in trainer/models/im2col.py. bf16, channels_last, on a CPU. The two ways are interleaved and the
best round of each counts; a ratio above 1 means that the product is faster. The table also has layers that the rules leave to oneDNN, to
show what is not gained and what would be lost. The step is forward and backward of ResNet-18 with the CIFAR stem on one batch of 100.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import add_arguments, described, finish, interleave, parser_of, spread, target
from trainer.models.im2col import Layer, result_of, takes_gradient, takes_result, use_im2col, weight_gradient_of
from trainer.models.vision import build_model
from trainer.settings.tree import ModelConfig

# (image side, in, out, stride), all 3 x 3: ResNet's layers for 32 and 224 pixels, and narrower ones.
LAYERS = (
    *((2, 512, 512, 1), (2, 256, 256, 1), (4, 512, 512, 1), (4, 256, 256, 1), (4, 128, 128, 1), (4, 64, 64, 1)),
    *((8, 256, 512, 2), (8, 128, 128, 2), (16, 128, 256, 2), (16, 64, 64, 2), (14, 256, 512, 2), (32, 64, 128, 2)),
    *((7, 512, 512, 1), (8, 256, 256, 1), (16, 128, 128, 1)),
)
STEP_BATCH = 100


def best_of(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each way's fastest round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for run in ways.values():
        run()
    for _, name in interleave(list(ways), rounds):
        began = time.perf_counter()
        ways[name]()
        seconds[name].append(time.perf_counter() - began)
    return {name: min(values) for name, values in seconds.items()}


def measure_layer(side: int, in_channels: int, out_channels: int, stride: int, images: int, rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)

    x, weight = random(images, in_channels, side, side), random(out_channels, in_channels, 3, 3)
    strides, padding = (stride, stride), (1, 1)
    rows = (side - 1) // stride + 1
    gradient = random(images, out_channels, rows, rows)
    layer = Layer(images=images, in_channels=in_channels, out_channels=out_channels, kernel=(3, 3), stride=stride, map_pixels=rows * rows)
    backward = partial(
        torch.ops.aten.convolution_backward, gradient, x, weight, None, strides, padding, (1, 1), False, (0, 0), 1, (False, True, False)
    )
    best = best_of(
        {
            "gradient, convolution": backward,
            "gradient, product": partial(weight_gradient_of, x, gradient, weight.shape[2:], strides, padding),
            "result, convolution": partial(F.conv2d, x, weight, None, strides, padding),
            "result, product": partial(result_of, x, weight, strides, padding),
        },
        rounds,
    )
    return {
        "layer": f"{in_channels} to {out_channels} on {side} x {side}" + (f", stride {stride}" if stride > 1 else ""),
        "images": images,
        "window_bytes": layer.window_bytes,
        "takes_gradient": takes_gradient(layer),
        "takes_result": takes_gradient(layer) and takes_result(layer),
        "gradient_ratio": best["gradient, convolution"] / best["gradient, product"],
        "result_ratio": best["result, convolution"] / best["result, product"],
        "milliseconds": {name: 1e3 * seconds for name, seconds in best.items()},
    }


def measure_step(rounds: int) -> dict[str, Any]:
    def network() -> nn.Module:
        config = ModelConfig(name="resnet18", weights="none", stem="article")
        return build_model(config, classes=10, seed=0, image_hw=(32, 32)).to(memory_format=torch.channels_last).train()

    models = {"convolution": network(), "product": network()}
    use_im2col(models["product"])
    images = torch.randn(STEP_BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(STEP_BATCH) % 10

    def step(model: nn.Module) -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()  # type: ignore[no-untyped-call]

    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number, name in interleave(list(models), rounds):
        began = time.perf_counter()
        step(models[name])
        if number >= 2:  # the first ones build oneDNN's kernels
            seconds[name].append(time.perf_counter() - began)
    ratios = [ours / theirs for ours, theirs in zip(seconds["product"], seconds["convolution"], strict=True)]
    return {"seconds": {name: spread(values) for name, values in seconds.items()}, "time_ratio": spread(ratios)}


def judged(layers: Sequence[dict[str, Any]], step: dict[str, Any]) -> list[dict[str, Any]]:
    taken = [row["gradient_ratio"] for row in layers if row["takes_gradient"]]
    forward = [row["result_ratio"] for row in layers if row["takes_result"]]
    ratio = step["time_ratio"]
    low, high = ratio["quartiles"]
    return [
        target("weight gradient, median of the layers taken: times oneDNN's speed", statistics.median(taken), at_least=1.0),
        target("weight gradient, the least of them", min(taken), at_least=0.95),
        target("forward, median of the layers taken: times oneDNN's speed", statistics.median(forward), at_least=1.0),
        target("forward, the least of them", min(forward), at_least=0.95),
        target("a step of ResNet-18: time with products by time without", ratio["median"], at_most=1.0, interval=(low, high)),
    ]


def lines_of(result: dict[str, Any]) -> list[str]:
    lines = ["times oneDNN's speed; * what train.small_maps=product takes"]
    for row in result["layers"]:
        words = [f"{row[f'{name}_ratio']:5.2f}{'*' if row[f'takes_{name}'] else ' '}" for name in ("gradient", "result")]
        size = row["window_bytes"] / 2**20
        lines.append(f"{row['layer']:32} batch {row['images']:4} ({size:6.1f} MiB)  weight gradient {words[0]}  forward {words[1]}")
    ratio = result["step"]["time_ratio"]
    lines.append(f"step: {ratio['median']:.3f} of the time ({ratio['quartiles'][0]:.3f} to {ratio['quartiles'][1]:.3f})")
    return lines


def main() -> int:
    parser = parser_of("small_maps", __doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-sizes", default="16,50,100,256", help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=24)
    add_arguments(parser)
    options = parser.parse_args()
    result = described("small_maps", options)
    torch.set_num_threads(options.threads)
    sizes = [int(size) for size in options.batch_sizes.split(",")]
    layers = [measure_layer(*layer, images, options.rounds) for layer, images in product(LAYERS, sizes)]
    step = measure_step(options.steps)
    result |= {"threads": options.threads, "layers": layers, "step": step, "targets": judged(layers, step)}
    return finish(result, options, lines_of(result))


if __name__ == "__main__":
    sys.exit(main())

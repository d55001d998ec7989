"""Streaming input: ours, torchvision's ImageFolder, webdataset, mosaicml-streaming, litdata and HF datasets, on the same JPEGs.

    python -m benchmarks.streaming --setup-peers                      once: the peers' packages, in an environment of their own
    python -m benchmarks.streaming [--size 224|32] [--rounds 3] [--images 10000] [--json] [--out FILE]

The images are crops of real pictures (scikit-image's and scikit-learn's), 256 to 500 pixels a side, quality 90. They are made once from a
seed in the scratch folder, and converted once to each contender's format; the result is kept there, and the conversion is reported
separately. With --size 32 they are 32x32.

Equal work: every contender reads its format from the local disk (after the conversion: from the page cache), shuffles in its own way,
decodes each JPEG to RGB, resizes its shorter side to `size` (bilinear, antialiased), crops the centre, mirrors half of them, and returns
uint8 batches. A DataLoader has 1 or 2 worker processes, ours as many decoding threads. `loader+decoder` names the decoder: by default the
peers use torchvision.io.decode_jpeg, the faster of the two common ones; `+pil` is the other; `ours+torchvision` is our loader with the
peers' decoder, to show how much of a difference is due to the decoder. DALI rounds sizes and the middle differently from PIL: the
difference to PIL's pixels is reported, and a row whose pixels are not those of the right picture says so.

Each measurement is a fresh process; contenders are interleaved. CPU time and memory are those of the process and its workers. First batch:
from the start of the process until a batch arrives, imports included and also reported separately. Memory: proportional set size, after
the first batch or after the last measured one, whichever is larger. Epoch: every image must come exactly once (here decoding is off for
the peers, never for ours). Resume: a state is saved in the middle of an epoch and a fresh process continues from it; it is exact if each
remaining image then comes once.
"""

import sys
from pathlib import Path

from benchmarks.common import add_arguments, described, finish, parser_of
from benchmarks.streaming import peers
from benchmarks.streaming.measure import Plan, interpreter, make_pictures, measure, table

HOME = Path("~/.cache/trainer-benchmarks").expanduser()
DEFAULT = (
    "ours+dali",
    "ours+torchvision",
    "imagefolder+pil",
    "imagefolder+torchvision",
    "webdataset+torchvision",
    "mosaicml-streaming+torchvision",
    "litdata+torchvision",
    "hf-map+torchvision",
    "hf-iterable+torchvision",
)


def main() -> int:
    parser = parser_of("streaming", __doc__)
    parser.add_argument("--setup-peers", nargs="?", type=Path, const=HOME / "peers", metavar="DIR", help="install the peers there, and end")
    parser.add_argument("--peers", type=Path, default=HOME / "peers", metavar="DIR", help="where --setup-peers put them (%(default)s)")
    parser.add_argument("--scratch", type=Path, default=HOME / "streaming", metavar="DIR", help="for images and formats (%(default)s)")
    parser.add_argument("--contenders", default=",".join(DEFAULT), help="loader+decoder, ... (all)")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=224, help="pixels a side of what is handed out (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", default="1,2", help="numbers of workers, or of our threads (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=8, help="batches before the measured ones (%(default)s)")
    parser.add_argument("--batches", type=int, default=0, help="measured in a round (20; small images: 120)")
    parser.add_argument("--window", type=int, default=2048, help="images shuffled together, where a loader has such a window (%(default)s)")
    parser.add_argument("--memory", type=int, default=256, help="MB of encoded images that ours may hold (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    add_arguments(parser)
    options = parser.parse_args()
    if options.setup_peers is not None:
        peers.setup(options.setup_peers.expanduser())
        print(f"the peers are in {options.setup_peers}")
        return 0
    result = described("streaming", options)
    python = interpreter(options.peers.expanduser())

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    plan = Plan(
        contenders=tuple(options.contenders.split(",")),
        python=python,
        scratch=options.scratch.expanduser(),
        size=options.size,
        batch_size=options.batch_size,
        workers=tuple(int(workers) for workers in options.workers.split(",")),
        rounds=options.rounds,
        warm_up_batches=options.warm_up,
        batches=options.batches or (20 if options.size > 64 else 120),
        seed=options.seed,
        window=options.window,
        memory_bytes=options.memory << 20,
    )
    try:
        images = make_pictures(python, plan.scratch, count=options.images, seed=options.seed, size=options.size)
        found = measure(plan, images, tell=tell)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result |= {
        "image_set": {
            "count": len(images.paths),
            "sha256": images.sha256,
            "encoded_bytes": images.encoded_bytes,
            "classes": list(images.classes),
            "made_of": dict(images.made_of),
            "seed": options.seed,
        },
        "size": plan.size,
        "batch_size": plan.batch_size,
        "rounds": plan.rounds,
        "warm_up_batches": plan.warm_up_batches,
        "batches": plan.batches,
        "window": plan.window,
        "memory_bytes_of_ours": plan.memory_bytes,
        **found,
    }
    about = f"{len(images.paths):,} JPEGs, {images.encoded_bytes / 1e6:,.0f} MB, to {plan.size}x{plan.size}, batches of {plan.batch_size}"
    return finish(result, options, [about, *table(result, plan.workers)])


if __name__ == "__main__":
    raise SystemExit(main())

"""The command that converts a source into a folder of Parquet shards, which training reads.

    python -m dataio.convert SOURCE DEST

Here are its options and what it prints; dataio.conversion does the work.
"""

from dataio.leaving import Leaving
from dataio.terminal import prepare_output

if __name__ == "__main__":
    leaving = Leaving()
    prepare_output(survive=True)

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

from dataio.codecs.text.form import text_form
from dataio.config import DataConfig, TooLong
from dataio.conversion import Progress, convert
from dataio.manifest import Manifest
from dataio.parquet import QUARANTINE_NAME, Dataset, open_dataset
from dataio.reading import described, warnings
from dataio.sources import Balanced, Source, open_source
from dataio.terminal import tell


def main(arguments: list[str] | None = None, *, prog: str = "python -m dataio.convert") -> int:
    """Runs `python -m dataio.convert`. Exit status: 0 done, 1 failed (a full disk), 2 a wrong setting or source, 130 interrupted."""
    options = _parser(prog).parse_args(arguments)
    started = time.monotonic()
    worked = False
    try:
        asked = DataConfig(tokenizer=options.tokenizer, max_tokens=options.max_tokens, too_long=options.too_long)
        texts = text_form(asked)
        source: Source = open_source(
            options.source,
            root=options.root.expanduser(),
            test_fraction=options.test_fraction,
            classes=tuple(name.strip() for name in options.classes.split(",")) if options.classes else None,
            validation_fraction=options.validation_fraction,
            targets=options.targets,
            image_column=options.image_column,
            label_column=options.label_column,
            text_column=options.text_column,
            holds_texts=texts is not None,
            corrections=options.corrections,
        )
        if options.sample is not None and options.corrections:
            raise ValueError(f"--corrections {options.corrections} is about samples of which --sample may leave out some; give one of them")
        if options.sample is not None:
            held_out = options.sample // 4 if options.sample_test is None else options.sample_test
            sizes = {split: options.sample if split == "train" else held_out for split in source.splits()}
            source = Balanced(source, sizes=sizes, seed=options.seed)
        elif options.sample_test is not None:
            raise ValueError("--sample-test goes with --sample; give both")
        with _display() as show:

            def on_progress(progress: Progress) -> None:
                nonlocal worked
                worked = True
                show(progress)

            manifest = convert(
                source,
                options.dest,
                max_bad_fraction=options.max_bad_fraction,
                max_image_pixels=options.max_image_pixels,
                on_progress=on_progress,
                force=options.force,
                threads=options.threads,
                texts=texts,
            )
    except (ValueError, OSError) as error:
        tell(f"error: {error}", sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        tell("stopped; run the same command again to go on after the last complete shard", sys.stderr)
        return 130
    if not worked:
        tell(f"{options.dest} is there already, made from this source with these settings", sys.stdout)
    dataset = open_dataset(options.dest)
    for line in warnings(manifest, dataset.reading, dataset.where):
        tell(f"warning: {line}", sys.stderr)
    tell(_summary(dataset, manifest, time.monotonic() - started), sys.stdout)
    return 0


def _parser(prog: str) -> argparse.ArgumentParser:
    defaults = DataConfig()
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Converts labelled images or texts into a folder that training reads. Stopped, it goes on when run again.",
    )
    parser.add_argument("source", help="cifar10, an archive, a table, a folder of Parquet or IDX files, or of class folders")
    parser.add_argument("dest", type=Path, help="the folder to make")
    parser.add_argument("--root", type=Path, default=Path(defaults.root), help="where a download goes (%(default)s)")
    parser.add_argument(
        "--test-fraction", type=float, default=defaults.test_fraction, help="held out where there is no test split (%(default)s)"
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=defaults.validation_fraction,
        help="held out of train for validation where there is no such split (%(default)s)",
    )
    parser.add_argument("--targets", default=defaults.targets, help="what is learnt: NAME[:label|labels|number],...; else the label alone")
    parser.add_argument(
        "--image-column", default="", help="column of a table or of Parquet files with the images; found by its usual names"
    )
    parser.add_argument("--label-column", default="", help="column with the one label to learn; found by its usual names")
    parser.add_argument(
        "--tokenizer", default="", metavar="FILE", help="the model's tokenizer.json, or a folder with it: the source holds texts then"
    )
    parser.add_argument("--text-column", default="", help="column with the texts, or two for pairs of texts; found by its usual names")
    parser.add_argument("--max-tokens", type=int, default=defaults.max_tokens, help="most tokens of a text (%(default)s)")
    parser.add_argument(
        "--too-long", choices=get_args(TooLong), default=defaults.too_long, help="cut longer texts, or refuse them (%(default)s)"
    )
    parser.add_argument(
        "--max-bad-fraction", type=float, default=defaults.max_bad_fraction, help="bad images tolerated, of all (%(default)s)"
    )
    parser.add_argument("--max-image-pixels", type=int, default=defaults.max_image_pixels, help="larger images are bad (%(default)s)")
    parser.add_argument(
        "--corrections", default="", metavar="FILE", help="CSV of key,action,label: what to relabel or drop (docs/labels.md)"
    )
    parser.add_argument("--classes", help="class names in order, separated by commas, in place of the source's")
    parser.add_argument("--sample", type=int, metavar="N", help="take N training images only, the same number of each class")
    parser.add_argument("--sample-test", type=int, metavar="M", help="and M test images (N/4)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (%(default)s)")
    parser.add_argument("--threads", type=int, default=max(1, min(4, len(os.sched_getaffinity(0)) - 1)), help="that decode (%(default)s)")
    parser.add_argument("--force", action="store_true", help="replace DEST")
    return parser


def _summary(dataset: Dataset, manifest: Manifest, seconds: float) -> str:
    bad = f" (see {QUARANTINE_NAME})" if manifest.quarantined else ""
    size = f"{dataset.size_bytes / 1e6:.1f} MB, {seconds:.1f} s"
    return f"{described(manifest, dataset.reading)}{bad}; {size}\nfingerprint {manifest.fingerprint}"


@contextlib.contextmanager
def _display() -> Iterator[Callable[[Progress], None]]:
    """Shows a bar per split on a terminal, else a plain line every few seconds."""
    if not sys.stderr.isatty():
        yield _plain_lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    timing = (TimeElapsedColumn(), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[bad]}"), *timing)
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def show(progress: Progress) -> None:
            if progress.split not in tasks:
                tasks[progress.split] = bars.add_task(progress.split, total=progress.total, bad="")
            bad = f"{progress.bad} bad" if progress.bad else ""
            bars.update(tasks[progress.split], completed=progress.done, total=progress.total, bad=bad)

        yield show


def _plain_lines(every_seconds: float = 5.0) -> Callable[[Progress], None]:
    shown = time.monotonic()

    def show(progress: Progress) -> None:
        nonlocal shown
        finished = progress.done == progress.total
        if not finished and time.monotonic() - shown < every_seconds:
            return
        shown = time.monotonic()
        tell(progress.describe(), sys.stderr)

    return show


if __name__ == "__main__":
    leaving.by(main)

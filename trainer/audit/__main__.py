"""The command line `python -m trainer.audit DATA|RUN` (`finetune audit`): looks for what is wrong with a data set before it is trained on.

Copies and looks need one pass over the images, or texts. Wrong labels need answers of models that have not seen them: one run for each of k
folds, which are told with their cost before they start. This file goes from part to part, and writes what was found; asked.py parses.
"""

from dataio.leaving import Leaving
from dataio.terminal import prepare_output

if __name__ == "__main__":
    leaving = Leaving()
    prepare_output()

import hashlib
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from rich.console import Console

from cluster.machine import usable_cpus
from dataio.codecs.image.decode import Decoder
from dataio.codecs.text.form import tokenizer_bytes, tokenizer_file
from dataio.config import DataConfig
from dataio.manifest import Manifest
from dataio.parquet import Dataset
from dataio.scan import look_at
from dataio.schema import is_single_label
from trainer.audit import folds, page, shown
from trainer.audit.asked import Asked, asked_of, settled_for, to_open
from trainer.audit.copies import find_copies
from trainer.audit.findings import Findings, Names, changes_of, of_samples, to_csv, with_labels
from trainer.audit.folds import Folds
from trainer.audit.gather import Bytes, Gathered, gather
from trainer.audit.kept import Kept
from trainer.audit.looks import odd_images
from trainer.audit.text_copies import find_text_copies
from trainer.audit.text_looks import notes_on, odd_texts
from trainer.audit.texts import gather_texts
from trainer.drive.data import open_data
from trainer.drive.guarded import guarded
from trainer.settings.balance import is_classification
from trainer.settings.programs import program
from trainer.settings.say import Terminal, complain, say
from trainer.settings.texts import problem_of_field
from trainer.settings.units import number

PAGE, FINDINGS, CHANGES, OTHER_CHANGES = "audit.html", "findings.json", "changes.csv", "changes-proposed.csv"
WORK, FOLDS = "work", "folds"
WRITTEN = ".changes.sha256"
"""The hash of the proposals as they were written: a file that has another one was edited, and is not written again."""


def main(argv: Sequence[str]) -> int:
    """Write the page and return 0; 1 if a fold failed, 128 + signal if one stopped it. Exits with 2 (SystemExit) for what is wrong with
    the arguments, the data or the settings."""
    return guarded(lambda _: _carry_out(asked_of(argv)), stopped="stopped; the same command goes on")


def _carry_out(asked: Asked) -> int:
    console = Terminal() if sys.stdout.isatty() else Terminal(width=160, highlight=False)
    if asked.invocation.takes_dir_recipe:
        say(f"settings of the recipe {asked.invocation.recipes[0]}; flags change them")
    if asked.line.dry_run:
        return _dry_run(asked)
    _, dataset = open_data(to_open(asked), console)
    if (problem := problem_of_field(asked.config, dataset.manifest)) is not None:
        raise ValueError(problem)
    job, left_out = planned(asked, dataset.manifest)
    asked.out.mkdir(parents=True, exist_ok=True)
    findings = look(asked, dataset, console)
    findings = replace(findings, left_out=tuple(left_out))
    if job is None or len(folds.finished(job)) < job.count:
        write(findings, dataset, asked.out)
    if job is not None:
        notes = folds.notes_on(asked.config, dataset.manifest.unit)
        for line in (*notes, f"labels: {folds.cost(job, dataset.manifest, run_seconds=asked.run_seconds)}"):
            say(line)
        folds.prepare(job, dataset.manifest.fingerprint)
        if status := folds.train(job, say, run_seconds=asked.run_seconds):
            complain(
                f"a fold ended with status {status}; what the {findings.unit} say by themselves is in {asked.out / PAGE}; the same command "
                "goes on"
            )
            return status
        findings = judged(job, dataset, replace(findings, notes=(*findings.notes, *notes)))
        write(findings, dataset, asked.out)
    _tell_result(findings, asked.out)
    return 0


def _dry_run(asked: Asked) -> int:
    """Say what would be done. Data that are not converted yet are looked at, not converted."""
    manifest = look_at(asked.config.data).manifest
    if manifest is None:
        raise ValueError(f"nothing is known of {asked.config.data.path} before it is converted; see {program('run')} --dry-run")
    counts = ", ".join(f"{number(split.count)} {name}" for name, split in manifest.splits.items())
    say(f"would read each {manifest.unit.removesuffix('s')} once: {counts}")
    job, left_out = planned(asked, manifest)
    for line in left_out:
        say(line)
    if job is not None:
        for line in (
            *folds.notes_on(asked.config, manifest.unit),
            f"labels: would train {folds.cost(job, manifest, run_seconds=asked.run_seconds)}",
        ):
            say(line)
    say(f"would write to {asked.out}")
    return 0


def planned(asked: Asked, manifest: Manifest) -> tuple[Folds | None, list[str]]:
    """The runs that judge the labels; or None and why there are none. ValueError for settings that do not fit the data."""
    targets = manifest.targets
    if asked.line.folds == 0:
        return None, ["Whether labels are wrong was not looked into (--folds 0)."]
    if not is_single_label(targets) or not is_classification(asked.config, targets) or len(targets[0].classes) < 2:
        kinds = ", ".join(f"{target.name} ({target.kind})" for target in targets)
        return None, [f"Whether labels are wrong was not looked into: that is done for one label of two classes or more, not for {kinds}."]
    least = manifest.splits["train"].count
    if least < asked.line.folds:
        raise ValueError(
            f"--folds {asked.line.folds} are more than the {least} training {manifest.unit}; use 0 to look at the {manifest.unit} only"
        )
    return folds.folds_of(settled_for(asked, manifest), asked.out / FOLDS, asked.line.folds), []


def look(asked: Asked, dataset: Dataset, console: Console) -> Findings:
    """What the images, or texts, say by themselves."""
    return look_at_images(asked, dataset, console) if dataset.manifest.texts is None else look_at_texts(asked, dataset, console)


def look_at_images(asked: Asked, dataset: Dataset, console: Console) -> Findings:
    """The working files lie in a folder of their own meanwhile."""
    work = asked.out / WORK
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    data = asked.config.data
    with console.status("reading images") as status:
        gathered = gather(
            dataset,
            data,
            work,
            threads=usable_cpus(),
            on_part=lambda done, of: status.update(f"read {number(done)} of {number(of)} images"),
        )
        groups = find_copies(
            gathered,
            are_equal=equal_by(dataset, data, gathered),
            on_block=lambda done, of: status.update(f"comparing images: part {number(done)} of {number(of)}"),
        )
        findings = of_samples(dataset.manifest, data.path, gathered, groups, odd_images(gathered), names_of(dataset, gathered))
    shutil.rmtree(work)  # mapped files stay readable until they are let go
    return findings


def look_at_texts(asked: Asked, dataset: Dataset, console: Console) -> Findings:
    """ValueError if the tokenizer is not that of the data."""
    manifest, data = dataset.manifest, asked.config.data
    with console.status("reading texts") as status:
        gathered = gather_texts(
            dataset,
            tokenizer_bytes(tokenizer_file(data.tokenizer)),
            on_part=lambda done, of: status.update(f"read {number(done)} of {number(of)} texts"),
        )
        groups = find_text_copies(
            gathered,
            on_block=lambda done, of: status.update(f"compared {number(done)} of {number(of)} pairs of texts"),
        )
    findings = of_samples(manifest, data.path, gathered, groups, odd_texts(gathered, manifest), names_of(dataset, gathered))
    return replace(findings, notes=tuple(notes_on(gathered, manifest)))


def names_of(dataset: Dataset, kept: Kept) -> Names:
    """Of the samples that were read."""
    return Names(kept, lambda split, rows: dataset.split(split).keys(rows), dataset.manifest.classes)


def equal_by(dataset: Dataset, data: DataConfig, gathered: Gathered) -> Callable[[int, int], bool]:
    """Whether two images of one size have the same pixels, by decoding them at that size."""
    group_of = lru_cache(maxsize=4)(lambda split, group: dataset.split(split).read_group(group).encoded)
    decoder_of = lru_cache(maxsize=4)(partial(Decoder, fit="refuse", background=data.behind, max_pixels=data.max_image_pixels))

    def pixels(image: int) -> Bytes:
        name, row = gathered.place(image)
        offsets = dataset.split(name).group_offsets
        group = int(np.searchsorted(offsets, row, side="right")) - 1
        height, width = gathered.sizes[image].tolist()
        encoded = group_of(name, group)[row - int(offsets[group])]
        decoded: Bytes = decoder_of(height=height, width=width).decode([encoded]).images[0]
        return decoded

    return lambda first, second: np.array_equal(pixels(first), pixels(second))


def judged(job: Folds, dataset: Dataset, findings: Findings) -> Findings:
    """With what the folds say of the labels."""
    train, test = folds.collect(job, say)
    answers = {"train": train} | ({"test": test} if test is not None else {})
    left_out = (
        [] if test is not None else [f"Labels of the test {findings.unit}: the folds have not recorded their answers to all of them."]
    )
    if folds.HELD_OUT in dataset.manifest.splits:
        left_out.append(f"Labels of the {folds.HELD_OUT} {findings.unit}, in whose place a run has its fold.")
    rows = {split: {key: row for row, key in enumerate(dataset.split(split).keys(range(dataset.split(split).count)))} for split in answers}
    found = with_labels(findings, answers, rows, folds=job.count)
    notes = folds.notes_on_answers(found.right, findings.unit) if found.right is not None else []
    return replace(found, left_out=(*findings.left_out, *left_out), notes=(*findings.notes, *notes))


def write(findings: Findings, dataset: Dataset, out: Path) -> None:
    """Write findings, proposals and page. Proposals that somebody has edited stay: the new ones then have another name."""
    proposed = to_csv(changes_of(findings), dataset.manifest.targets).encode(errors="replace")
    there, mark = out / CHANGES, out / WRITTEN
    is_edited = there.is_file() and (not mark.is_file() or mark.read_text() != _sha256(there.read_bytes()))
    name = OTHER_CHANGES if is_edited and there.read_bytes() != proposed else CHANGES
    _put(out / name, proposed)
    if name == CHANGES:
        _put(mark, _sha256(proposed).encode())
    else:
        say(f"{there} was edited, and stays; what is proposed now is in {out / OTHER_CHANGES}")
    _put(out / FINDINGS, findings.to_json().encode(errors="replace"))
    shown.write(findings, dataset, out / PAGE, str(out / name), _put)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _put(path: Path, data: bytes) -> None:
    """A reader sees the old file or the new one."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    os.replace(part, path)


def _tell_result(findings: Findings, out: Path) -> None:
    say(page.verdict(findings)[1])
    for line in (*findings.left_out, *findings.notes):
        say(line)
    actions = Counter(change.action for change in changes_of(findings))
    listed = ", ".join(f"{number(count)} to {action}" for action, count in sorted(actions.items()))
    say(f"page: {out / PAGE}")
    if listed:
        say(f"proposed changes, to be looked at and edited: {out / CHANGES} ({listed}); a run takes them by --data.corrections")


if __name__ == "__main__":
    leaving.by(lambda: main(sys.argv[1:]))

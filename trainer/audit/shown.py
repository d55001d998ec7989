"""The images, or the texts, that the page of an audit shows. __main__.py calls `write`, page.py draws.

They are chosen first, those of the surest findings of each kind, read from the data by row group, and put into the page within PAGE_BYTES,
images scaled down. Findings beyond that are told without them, or counted; findings.json has all.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from dataio.parquet import Dataset
from trainer.audit.findings import Findings, Sample
from trainer.audit.page import IN_GROUP, MOST, render
from trainer.report.thumbnails import TEXT_CHARACTERS, thumbnail
from trainer.settings.units import number, size

PAGE_BYTES = 6_000_000
"""For all of them, in their form in the page."""
READ_BYTES = 1_000_000_000
"""Of the data set; row groups are read whole."""


def chosen(findings: Findings) -> list[Sample]:
    """The samples that the page shows, the most important first: the first finding of each kind, the second of each, ..."""
    kinds: list[list[list[Sample]]] = [
        [list(each.samples[:IN_GROUP]) for each in findings.leaks[:MOST]],
        [list(each.samples[:IN_GROUP]) for each in findings.contradictions[:MOST]],
        [[each.sample] for each in findings.doubts[:MOST]],
        [list(each.samples[:IN_GROUP]) for each in findings.repeats[:MOST]],
        [[each.sample] for each in findings.oddities[:MOST]],
    ]
    turns = (found[turn] for turn in range(MOST) for found in kinds if turn < len(found))
    return list(dict.fromkeys(each for samples in turns for each in samples))


def read(samples: Iterable[Sample], dataset: Dataset) -> tuple[dict[Sample, str], list[str]]:
    """(sample -> what is shown of it, what is left out). Raises what reading raises."""
    unit = dataset.manifest.unit
    wanted, unread = _within_reach(samples, dataset)
    found: dict[Sample, str] = {}
    undecodable = unfit = used = 0
    sources = dict(_thumbnails(wanted, dataset) if dataset.manifest.texts is None else _texts(wanted, dataset))
    for each in (each for each in wanted if each in sources):
        source = sources[each]
        if source is None:
            undecodable += 1
        elif used + len(source.encode(errors="replace")) > PAGE_BYTES:
            unfit += 1
        else:
            used += len(source.encode(errors="replace"))
            found[each] = source
    notes = []
    if unfit:
        notes.append(f"{number(unfit)} more {unit} would make this page larger than {size(PAGE_BYTES)}.")
    if unread:
        notes.append(f"{number(unread)} {unit} are not shown, as reading them takes more than {size(READ_BYTES)} of the data set.")
    if undecodable:
        notes.append(f"{number(undecodable)} {unit} could not be decoded for this page.")
    return found, notes


def _within_reach(samples: Iterable[Sample], dataset: Dataset) -> tuple[list[Sample], int]:
    """Those that are read, and how many are not because of READ_BYTES."""
    left, groups, kept, unread = READ_BYTES, set[tuple[str, int]](), list[Sample](), 0
    for each in samples:
        split = dataset.split(each.split)
        group = int((split.group_offsets[1:] <= each.row).sum())
        if (each.split, group) not in groups:
            if (needed := split.group_bytes(group)) > left and groups:
                unread += 1
                continue
            left -= needed
            groups.add((each.split, group))
        kept.append(each)
    return kept, unread


def _thumbnails(samples: Sequence[Sample], dataset: Dataset) -> Iterator[tuple[Sample, str | None]]:
    """A row group is read once, and forgotten."""
    for name in dict.fromkeys(each.split for each in samples):
        split = dataset.split(name)
        here = sorted((each for each in samples if each.split == name), key=lambda each: each.row)
        for number_of in range(split.groups):
            begin, end = int(split.group_offsets[number_of]), int(split.group_offsets[number_of + 1])
            inside = [each for each in here if begin <= each.row < end]
            if inside:
                encoded = split.read_group(number_of).encoded
                yield from ((each, thumbnail(encoded[each.row - begin].tobytes())) for each in inside)


def _texts(samples: Sequence[Sample], dataset: Dataset) -> Iterator[tuple[Sample, str]]:
    """The beginning of each."""
    for name in dict.fromkeys(each.split for each in samples):
        here = [each for each in samples if each.split == name]
        for each, text in zip(here, dataset.split(name).texts([each.row for each in here]), strict=True):
            yield each, text if len(text) <= TEXT_CHARACTERS else f"{text[:TEXT_CHARACTERS]}..."


def write(findings: Findings, dataset: Dataset, file: Path, changes: str, put: Callable[[Path, bytes], None]) -> None:
    """Write the page; `put` writes a file. If samples cannot be read, it says so and has none."""
    try:
        shown, notes = read(chosen(findings), dataset)
    except (OSError, ValueError) as error:
        shown, notes = {}, [f"There are no {findings.unit} here: {error}."]
    put(file, render(findings, shown, changes=changes, notes=notes).encode(errors="replace"))

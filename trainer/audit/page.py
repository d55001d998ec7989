"""The page of an audit: each finding with its images. __main__.py writes it. One file, without a script and without a request to anyone;
what opens does so by `details`, with the keyboard too.

Images are chosen first, the surest findings of each kind, read from the data by row group, scaled down and put into the page, within
PAGE_BYTES. Findings beyond that are told without their images, or counted; findings.json has all.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from dataio.parquet import Dataset
from trainer.audit.findings import SAME, Copies, Doubt, Findings, Image, Oddity
from trainer.report.page import NOTHING, Html, image, join, page, section, short, table, tag
from trainer.report.thumbnails import thumbnail
from trainer.settings.units import number, percent, size

PAGE_BYTES = 6_000_000
"""For all images, in their form in the page."""
READ_BYTES = 1_000_000_000
"""Of the data set; row groups are read whole."""
MOST = 96
"""Findings of a kind that are shown."""
OPEN = 24
"""Findings of a kind that are seen without opening anything."""
IN_GROUP = 6
"""Images of a group of copies that are shown."""
MOST_OVERLAPS = 20
MOST_LISTED = 50


def render(findings: Findings, pictures: Mapping[Image, str], *, changes: str, notes: Sequence[str] = ()) -> str:
    """The page. `pictures`: image -> its data: URI. `changes`: where the proposed changes are."""
    parts = [
        _head(findings),
        _what_to_do(findings, changes),
        _copies("Leaks", LEAKS, findings.leaks, pictures),
        _copies("Copies with different labels", CONTRADICTIONS, findings.contradictions, pictures),
        _doubts(findings, pictures),
        _overlaps(findings),
        _copies("Copies", REPEATS, findings.repeats, pictures),
        _oddities(findings.oddities, pictures),
        _unreadable(findings.unreadable),
        _not_shown([*findings.left_out, *findings.notes, *notes]),
    ]
    return page(f"Audit of {findings.data}", *parts)


LEAKS = "The same picture in several splits: a model is tested on what it has learned, and its results say less of new images."
CONTRADICTIONS = "The same picture under different labels: at least one of them is wrong."
REPEATS = (
    "The same picture several times under one label. Near copies are compared with the next different image of the data: a copy is less "
    "than 0.55 times as far away."
)


def _head(findings: Findings) -> Html:
    mood, words = verdict(findings)
    counts = ", ".join(f"{number(count)} {split}" for split, count in findings.counts.items())
    figures: list[tuple[str, object]] = [
        ("images", counts),
        ("leaks", number(len(findings.leaks))),
        ("copies with different labels", number(len(findings.contradictions))),
        ("labels doubted", number(len(findings.doubts)) if findings.folds else "not looked for"),
        ("other copies", number(len(findings.repeats))),
        ("odd images", number(len(findings.oddities))),
    ]
    cells = join(tag("div", tag("dt", name), tag("dd", value)) for name, value in figures)
    return tag("header", tag("h1", f"Audit of {short(findings.data, 200)}"), tag("p", words, class_=f"verdict {mood}"), tag("dl", cells))


def verdict(findings: Findings) -> tuple[str, str]:
    """(mood, sentence) for the whole."""
    found = []
    if findings.leaks:
        found.append(_counted(len(findings.leaks), "picture is", "pictures are") + " in several splits")
    if findings.contradictions:
        found.append(_counted(len(findings.contradictions), "picture has", "pictures have") + " different labels")
    if findings.doubts:
        found.append(_counted(len(findings.doubts), "label is", "labels are") + " doubted")
    if findings.unreadable:
        found.append(_counted(len(findings.unreadable), "image", "images") + " could not be read")
    told = f"{', '.join(found)}." if found else "No leak and no contradiction was found."
    if not findings.folds:
        told += " Whether labels are wrong was not looked into."
    return ("bad" if findings.leaks else "warn" if found else "good"), told


def _counted(count: int, one: str, several: str) -> str:
    return f"{number(count)} {one if count == 1 else several}"


def _what_to_do(findings: Findings, changes: str) -> Html:
    if not (findings.copies or findings.doubts or findings.oddities):
        return NOTHING
    told = tag(
        "p",
        "Proposals, a row for each image, are in ",
        tag("code", changes, class_="wrap"),
        ": drop, relabel or keep, with the reason. They are guesses: look at the images below, change the rows, then train with ",
        tag("code", f"--data.corrections {changes}", class_="wrap"),
        ".",
    )
    return section("What to do", told)


def _copies(title: str, about: str, found: Sequence[Copies], pictures: Mapping[Image, str]) -> Html:
    figures = [_group(copies, pictures) for copies in found[:MOST]]
    return _listed(title, about, figures, len(found))


def _group(copies: Copies, pictures: Mapping[Image, str]) -> Html:
    members = copies.images[:IN_GROUP]
    images = [_picture(each, pictures) for each in members]
    lines = [
        tag("span", f"{each.split}: ", short(each.key, 120), _label_of(each, copies), class_="id")
        for each, how in zip(members, copies.how, strict=False)
    ]
    more = [tag("span", f"and {number(len(copies.images) - IN_GROUP)} more")] if len(copies.images) > IN_GROUP else []
    sure = "" if copies.is_exact else f", {copies.ratio:.2f} of the way to the next"
    heading = tag("span", f"{SAME[max(copies.how, key=list(SAME).index)]}{sure}")
    row = tag("div", *images, style="display:flex;flex-wrap:wrap;gap:.3rem")
    return tag("figure", row, tag("figcaption", heading, *lines, *more), style="grid-column:span 2")


def _label_of(each: Image, copies: Copies) -> Html:
    if each.label is None:
        return NOTHING
    return tag("b", each.label) if copies.is_contradictory else tag("span", f" ({each.label})")


def _doubts(findings: Findings, pictures: Mapping[Image, str]) -> Html:
    if not findings.folds:
        return NOTHING
    about = (
        "What the label says, then what models say that were not trained on the image, with the probabilities that they give to "
        f"their answer and to the label: {number(findings.folds)} models, each asked about the images that the others were trained on. "
        f"They answered {percent(findings.right)} of the training images as labelled."
    )
    return _listed("Labels that are doubted", about, [_doubt(each, pictures) for each in findings.doubts[:MOST]], len(findings.doubts))


def _doubt(doubt: Doubt, pictures: Mapping[Image, str]) -> Html:
    lines = [
        tag("span", doubt.image.label or ""),
        tag("b", doubt.answer),
        tag("span", f"{percent(doubt.of_answer)}, {percent(doubt.of_label)}"),
        tag("span", f"{doubt.image.split}: ", short(doubt.image.key, 120), class_="id"),
    ]
    return tag("figure", _picture(doubt.image, pictures), tag("figcaption", *lines))


def _overlaps(findings: Findings) -> Html:
    if not findings.overlaps:
        return NOTHING
    names = findings.classes
    rows = [
        (names[each.first], names[each.second], number(each.first_as_second), number(each.second_as_first), each.in_words)
        for each in findings.overlaps[:MOST_OVERLAPS]
    ]
    about = (
        "Classes that models take for each other in images that they have not seen. Many mistakes both ways mean that the classes overlap, "
        "or that their labels do; many one way that one of them takes in the other."
    )
    head = ("class", "and", "first taken for second", "second for first", "of both")
    return section("Classes that overlap", tag("p", about, class_="soft"), table(head, rows, numeric=(2, 3, 4)))


def _oddities(found: Sequence[Oddity], pictures: Mapping[Image, str]) -> Html:
    about = "Images that look unlike the others of these data, the farthest from their median first, in robust standard deviations."
    return _listed("Odd images", about, [_oddity(each, pictures) for each in found[:MOST]], len(found))


def _oddity(odd: Oddity, pictures: Mapping[Image, str]) -> Html:
    far = [] if odd.far == float("inf") else [tag("span", f"{odd.far:.1f} deviations")]
    lines = [tag("span", odd.what), *far, tag("span", f"{odd.image.split}: ", short(odd.image.key, 120), class_="id")]
    return tag("figure", _picture(odd.image, pictures), tag("figcaption", *lines))


def _listed(title: str, about: str, figures: Sequence[Html], count: int) -> Html:
    """A section of findings, of which some are folded away."""
    if not figures:
        return NOTHING
    parts = [tag("p", about, class_="soft"), tag("div", *figures[:OPEN], class_="thumbnails")]
    if len(figures) > OPEN:
        rest = tag("div", *figures[OPEN:], class_="thumbnails")
        parts.append(tag("details", tag("summary", f"{number(len(figures) - OPEN)} more"), rest))
    if count > len(figures):
        parts.append(tag("p", f"{number(count - len(figures))} more are in findings.json.", class_="soft"))
    return section(f"{title} ({number(count)})", *parts)


def _unreadable(found: Sequence[Image]) -> Html:
    if not found:
        return NOTHING
    rows = [(each.split, short(each.key, 200)) for each in found[:MOST_LISTED]]
    more = f"{number(len(found) - MOST_LISTED)} more are in findings.json." if len(found) > MOST_LISTED else ""
    return section(f"Images that could not be read ({number(len(found))})", table(("split", "key"), rows), tag("p", more, class_="soft"))


def _not_shown(notes: Sequence[str]) -> Html:
    return section("What was left out", tag("ul", *(tag("li", note) for note in notes))) if notes else NOTHING


def _picture(each: Image, pictures: Mapping[Image, str]) -> Html:
    what = f"{each.split} {short(each.key, 120)}{f', {each.label}' if each.label is not None else ''}"
    source = pictures.get(each)
    if source is None:
        return tag("span", "no image", class_="soft")
    pixels = "pixels" if source.startswith("data:image/png") else ""
    return image(src=source, alt=what, title=what, class_=pixels, loading="lazy")


# --- images -----------------------------------------------------------------------------------------------------------------------------


def chosen(findings: Findings) -> list[Image]:
    """The images that the page shows, the most important first: the first finding of each kind, the second of each, ..."""
    kinds: list[list[list[Image]]] = [
        [list(each.images[:IN_GROUP]) for each in findings.leaks[:MOST]],
        [list(each.images[:IN_GROUP]) for each in findings.contradictions[:MOST]],
        [[each.image] for each in findings.doubts[:MOST]],
        [list(each.images[:IN_GROUP]) for each in findings.repeats[:MOST]],
        [[each.image] for each in findings.oddities[:MOST]],
    ]
    turns = (found[turn] for turn in range(MOST) for found in kinds if turn < len(found))
    return list(dict.fromkeys(each for images in turns for each in images))


def read_pictures(images: Iterable[Image], dataset: Dataset) -> tuple[dict[Image, str], list[str]]:
    """(image -> its data: URI, what is left out). Raises what reading raises."""
    wanted, unread = _within_reach(images, dataset)
    found: dict[Image, str] = {}
    undecodable = unfit = used = 0
    sources = dict(_thumbnails(wanted, dataset))
    for each in (each for each in wanted if each in sources):
        source = sources[each]
        if source is None:
            undecodable += 1
        elif used + len(source) > PAGE_BYTES:
            unfit += 1
        else:
            used += len(source)
            found[each] = source
    notes = []
    if unfit:
        notes.append(f"{number(unfit)} more images would make this page larger than {size(PAGE_BYTES)}.")
    if unread:
        notes.append(f"{number(unread)} images are not shown, as reading them takes more than {size(READ_BYTES)} of the data set.")
    if undecodable:
        notes.append(f"{number(undecodable)} images could not be decoded for this page.")
    return found, notes


def _within_reach(images: Iterable[Image], dataset: Dataset) -> tuple[list[Image], int]:
    """Those that are read, and how many are not because of READ_BYTES."""
    left, groups, kept, unread = READ_BYTES, set[tuple[str, int]](), list[Image](), 0
    for each in images:
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


def _thumbnails(images: Sequence[Image], dataset: Dataset) -> Iterator[tuple[Image, str | None]]:
    """A row group is read once, and forgotten."""
    for name in dict.fromkeys(each.split for each in images):
        split = dataset.split(name)
        here = sorted((each for each in images if each.split == name), key=lambda each: each.row)
        for number_of in range(split.groups):
            begin, end = int(split.group_offsets[number_of]), int(split.group_offsets[number_of + 1])
            inside = [each for each in here if begin <= each.row < end]
            if inside:
                encoded = split.read_group(number_of).encoded
                yield from ((each, thumbnail(encoded[each.row - begin].tobytes())) for each in inside)


def write(findings: Findings, dataset: Dataset, file: Path, changes: str, put: Callable[[Path, bytes], None]) -> None:
    """Write the page; `put` writes a file. If images cannot be read, it says so and has none."""
    try:
        pictures, notes = read_pictures(chosen(findings), dataset)
    except (OSError, ValueError) as error:
        pictures, notes = {}, [f"There are no images here: {error}."]
    put(file, render(findings, pictures, changes=changes, notes=notes).encode(errors="replace"))

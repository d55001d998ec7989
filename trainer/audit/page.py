"""The page of an audit: each finding with its images, or its texts. shown.py reads them and writes it. One file, without a script and
without a request to anyone; what opens does so by `details`, with the keyboard too.
"""

from collections.abc import Mapping, Sequence

from trainer.audit.findings import SAME, Copies, Doubt, Findings, Oddity, Sample
from trainer.audit.looks import Overlap
from trainer.audit.text_copies import LEAST
from trainer.audit.texts import LENGTH
from trainer.report.page import NOTHING, Html, image, join, page, quoted, section, short, table, tag
from trainer.settings.units import number, percent

MOST = 96
"""Findings of a kind that are shown."""
OPEN = 24
"""Findings of a kind that are seen without opening anything."""
IN_GROUP = 6
"""Samples of a group of copies that are shown."""
MOST_OVERLAPS = 20
MOST_LISTED = 50
TEXTS = "grid-template-columns:repeat(auto-fill,minmax(17rem,1fr))"
"""How wide texts are shown."""

Shown = Mapping[Sample, str]
"""Sample -> what is shown of it: of an image its data: URI, of a text its beginning, which is text and no markup."""


def render(findings: Findings, shown: Shown, *, changes: str, notes: Sequence[str] = ()) -> str:
    """The page. `changes`: where the proposed changes are."""
    what = _thing(findings)
    parts = [
        _head(findings),
        _what_to_do(findings, changes),
        _copies("Leaks", LEAKS.format(what=what, unit=findings.unit), findings.leaks, findings, shown),
        _copies("Copies with different labels", CONTRADICTIONS.format(what=what), findings.contradictions, findings, shown),
        _doubts(findings, shown),
        _overlaps(findings),
        _copies("Copies", f"{REPEATS.format(what=what)} {NEAR[findings.unit]}", findings.repeats, findings, shown),
        _oddities(findings, shown),
        _unreadable(findings),
        _not_shown([*findings.left_out, *findings.notes, *notes]),
    ]
    return page(f"Audit of {findings.data}", *parts)


LEAKS = "The same {what} in several splits: a model is tested on what it has learned, and its results say less of new {unit}."
CONTRADICTIONS = "The same {what} under different labels: at least one of them is wrong."
REPEATS = "The same {what} several times under one label."
NEAR = {
    "images": "Near copies are compared with the next different image of the data: a copy is less than 0.55 times as far away.",
    "texts": f"Near copies have at least {LEAST} % of their runs of {LENGTH} characters in common; those that few others have count most.",
}


def _thing(findings: Findings) -> str:
    """What copies are copies of."""
    return "text" if findings.unit == "texts" else "picture"


def _one(findings: Findings) -> str:
    """A sample: image, or text."""
    return findings.unit.removesuffix("s")


def _head(findings: Findings) -> Html:
    mood, words = verdict(findings)
    counts = ", ".join(f"{number(count)} {split}" for split, count in findings.counts.items())
    figures: list[tuple[str, object]] = [
        (findings.unit, counts),
        ("leaks", number(len(findings.leaks))),
        ("copies with different labels", number(len(findings.contradictions))),
        ("labels doubted", number(len(findings.doubts)) if findings.folds else "not looked for"),
        ("other copies", number(len(findings.repeats))),
        (f"odd {findings.unit}", number(len(findings.oddities))),
    ]
    cells = join(tag("div", tag("dt", name), tag("dd", value)) for name, value in figures)
    return tag("header", tag("h1", f"Audit of {short(findings.data, 200)}"), tag("p", words, class_=f"verdict {mood}"), tag("dl", cells))


def verdict(findings: Findings) -> tuple[str, str]:
    """(mood, sentence) for the whole."""
    found, what = [], _thing(findings)
    if findings.leaks:
        found.append(_counted(len(findings.leaks), f"{what} is", f"{what}s are") + " in several splits")
    if findings.contradictions:
        found.append(_counted(len(findings.contradictions), f"{what} has", f"{what}s have") + " different labels")
    if findings.doubts:
        found.append(_counted(len(findings.doubts), "label is", "labels are") + " doubted")
    if findings.unreadable:
        found.append(_counted(len(findings.unreadable), _one(findings), findings.unit) + " could not be read")
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
        f"Proposals, a row for each {_one(findings)}, are in ",
        tag("code", changes, class_="wrap"),
        f": drop, relabel or keep, with the reason. They are guesses: look at the {findings.unit} below, change the rows, then train with ",
        tag("code", f"--data.corrections {changes}", class_="wrap"),
        ".",
    )
    return section("What to do", told)


def _copies(title: str, about: str, found: Sequence[Copies], findings: Findings, shown: Shown) -> Html:
    figures = [_group(copies, findings.unit, shown) for copies in found[:MOST]]
    return _listed(title, about, figures, len(found), findings.unit)


def _group(copies: Copies, unit: str, shown: Shown) -> Html:
    members = copies.samples[:IN_GROUP]
    seen = [_sample(each, unit, shown) for each in members]
    lines = [
        tag("span", f"{each.split}: ", short(each.key, 120), _label_of(each, copies), class_="id")
        for each, how in zip(members, copies.how, strict=False)
    ]
    more = [tag("span", f"and {number(len(copies.samples) - IN_GROUP)} more")] if len(copies.samples) > IN_GROUP else []
    close = f"{percent(1 - copies.ratio)} in common" if unit == "texts" else f"{copies.ratio:.2f} of the way to the next"
    sure = "" if copies.is_exact else f", {close}"
    heading = tag("span", f"{SAME[max(copies.how, key=list(SAME).index)]}{sure}")
    if unit == "texts":
        apart = [tag("div", each, style="margin-bottom:.4rem") for each in seen]
        return tag("figure", *apart, tag("figcaption", heading, *lines, *more))
    row = tag("div", *seen, style="display:flex;flex-wrap:wrap;gap:.3rem")
    return tag("figure", row, tag("figcaption", heading, *lines, *more), style="grid-column:span 2")


def _label_of(each: Sample, copies: Copies) -> Html:
    if each.label is None:
        return NOTHING
    return tag("b", each.label) if copies.is_contradictory else tag("span", f" ({each.label})")


def _doubts(findings: Findings, shown: Shown) -> Html:
    if not findings.folds:
        return NOTHING
    about = (
        f"What the label says, then what models say that were not trained on the {_one(findings)}, with the probabilities that they give "
        f"to their answer and to the label: {number(findings.folds)} models, each asked about the {findings.unit} that the others were "
        f"trained on. They answered {percent(findings.right)} of the training {findings.unit} as labelled."
    )
    figures = [_doubt(each, findings.unit, shown) for each in findings.doubts[:MOST]]
    return _listed("Labels that are doubted", about, figures, len(findings.doubts), findings.unit)


def _doubt(doubt: Doubt, unit: str, shown: Shown) -> Html:
    lines = [
        tag("span", doubt.sample.label or ""),
        tag("b", doubt.answer),
        tag("span", f"{percent(doubt.of_answer)}, {percent(doubt.of_label)}"),
        tag("span", f"{doubt.sample.split}: ", short(doubt.sample.key, 120), class_="id"),
    ]
    return tag("figure", _sample(doubt.sample, unit, shown), tag("figcaption", *lines))


def _overlaps(findings: Findings) -> Html:
    if not findings.overlaps:
        return NOTHING
    names = findings.classes
    rows = [
        (names[each.first], names[each.second], number(each.first_as_second), number(each.second_as_first), _of_both(each, findings.unit))
        for each in findings.overlaps[:MOST_OVERLAPS]
    ]
    about = (
        f"Classes that models take for each other in {findings.unit} that they have not seen. Many mistakes both ways mean that the "
        "classes overlap, or that their labels do; many one way that one of them takes in the other."
    )
    head = ("class", "and", "first taken for second", "second for first", "of both")
    return section("Classes that overlap", tag("p", about, class_="soft"), table(head, rows, numeric=(2, 3, 4)))


def _of_both(pair: Overlap, unit: str) -> str:
    return f"{percent(pair.share)} of {number(pair.samples)} {unit}"


def _oddities(findings: Findings, shown: Shown) -> Html:
    unit, found = findings.unit, findings.oddities
    are = "are" if unit == "texts" else "look"
    about = (
        f"{unit.capitalize()} that {are} unlike the others of these data, the farthest from their median first, in robust standard "
        "deviations."
    )
    return _listed(f"Odd {unit}", about, [_oddity(each, unit, shown) for each in found[:MOST]], len(found), unit)


def _oddity(odd: Oddity, unit: str, shown: Shown) -> Html:
    far = [] if odd.far == float("inf") else [tag("span", f"{odd.far:.1f} deviations")]
    lines = [tag("span", odd.what), *far, tag("span", f"{odd.sample.split}: ", short(odd.sample.key, 120), class_="id")]
    return tag("figure", _sample(odd.sample, unit, shown), tag("figcaption", *lines))


def _listed(title: str, about: str, figures: Sequence[Html], count: int, unit: str) -> Html:
    """A section of findings, of which some are folded away."""
    if not figures:
        return NOTHING
    wide = {"style": TEXTS} if unit == "texts" else {}
    parts = [tag("p", about, class_="soft"), tag("div", *figures[:OPEN], class_="thumbnails", **wide)]
    if len(figures) > OPEN:
        rest = tag("div", *figures[OPEN:], class_="thumbnails", **wide)
        parts.append(tag("details", tag("summary", f"{number(len(figures) - OPEN)} more"), rest))
    if count > len(figures):
        parts.append(tag("p", f"{number(count - len(figures))} more are in findings.json.", class_="soft"))
    return section(f"{title} ({number(count)})", *parts)


def _unreadable(findings: Findings) -> Html:
    found = findings.unreadable
    if not found:
        return NOTHING
    rows = [(each.split, short(each.key, 200)) for each in found[:MOST_LISTED]]
    more = f"{number(len(found) - MOST_LISTED)} more are in findings.json." if len(found) > MOST_LISTED else ""
    return section(
        f"{findings.unit.capitalize()} that could not be read ({number(len(found))})",
        table(("split", "key"), rows),
        tag("p", more, class_="soft"),
    )


def _not_shown(notes: Sequence[str]) -> Html:
    return section("What was left out", tag("ul", *(tag("li", note) for note in notes))) if notes else NOTHING


def _sample(each: Sample, unit: str, shown: Shown) -> Html:
    """An image, or the beginning of a text."""
    what = f"{each.split} {short(each.key, 120)}{f', {each.label}' if each.label is not None else ''}"
    source = shown.get(each)
    if source is None:
        return tag("span", f"no {unit.removesuffix('s')}", class_="soft")
    if unit == "texts":
        return quoted(source, title=what)
    pixels = "pixels" if source.startswith("data:image/png") else ""
    return image(src=source, alt=what, title=what, class_=pixels, loading="lazy")

"""A sample's image, or its text, with the model's answer. Called by the panels that show samples."""

from collections.abc import Iterable, Sequence

from trainer.report.files import RunFiles
from trainer.report.marked import marked
from trainer.report.page import Html, image, quoted, short, tag
from trainer.report.thumbnails import Cell, Thumbnails
from trainer.settings.units import percent
from trainer.tasks.predictions import Predictions


def shown_samples(run: RunFiles, figures: Iterable[Html], kind: str = "") -> Html:
    """The figures of several samples. `kind`: further classes of their frame."""
    texts = {"style": "grid-template-columns:repeat(auto-fill,minmax(17rem,1fr))"} if run.thumbnails.are_texts else {}
    return tag("div", *figures, class_=f"thumbnails {kind}".strip(), **texts)


def labelled_picture(row: int, names: Sequence[str], found: Predictions, thumbnails: Thumbnails, *, said: bool = False) -> Html:
    """For classification. `said`: with class and answer, where the position does not show them."""
    key, sure = short(found.keys[row], 200), percent(float(found.confidence[row]))
    cell = (int(found.labels[row]), int(found.answers[row]))
    lines: list[Html] = []
    if said:
        lines += [tag("span", names[cell[0]]), tag("b", names[cell[1]])]
    lines += [tag("span", f"{sure} sure"), tag("span", key, class_="id")]
    what = f"{key}: {named_cell(cell, names)}, {sure} sure"
    title = f"{key}, loss {found.losses[row]:.2f}"
    return picture(row, thumbnails, lines, alt=what, title=title, kind="right" if cell[0] == cell[1] else "wrong")


def picture(row: int, thumbnails: Thumbnails, lines: Sequence[Html], *, alt: str, title: str, kind: str) -> Html:
    """The image, beside it its map of where the answer comes from, if there is one; or the text, with its marks."""
    source = thumbnails.sources[row]
    if thumbnails.are_texts:
        read = quoted(*marked(source, thumbnails.marks.get(row, ())))
        return tag("figure", read, tag("figcaption", *lines), class_=kind, title=title)
    pixels = "pixels" if source.startswith("data:image/png") else ""
    shown = image(src=source, alt=alt, class_=pixels)
    why = thumbnails.why.get(row)
    if why is not None:
        shown = tag("div", shown, image(src=why, alt="where the answer comes from"), class_="pair")
    classes = kind if why is None else f"{kind} explained"
    return tag("figure", shown, tag("figcaption", *lines), class_=classes, title=title)


def why_words(run: RunFiles) -> str:
    """A sentence on the maps, or the marks; "" if there are none."""
    about = run.explanations.about if run.explanations is not None else None
    if about is None:
        return ""
    if about.note:
        return f"Answers are not explained: {short(about.note, 300)}."
    if run.thumbnails.marks:
        return f"Marked in some: the words on which the answer rests ({short(about.method, 20)}), the stronger the more."
    if not run.thumbnails.why:
        return ""
    return f"Beside some: where in the image the answer comes from ({short(about.method, 20)}), red where it rests on a place, yellow most."


def named_cell(cell: Cell, names: Sequence[str]) -> str:
    return f"{names[cell[0]]}, recognised" if cell[0] == cell[1] else f"{names[cell[0]]} taken for {names[cell[1]]}"

"""A sample's image with the model's answer. Called by the panels that show images."""

from collections.abc import Sequence

from trainer.report.page import Html, image, short, tag
from trainer.report.thumbnails import Cell
from trainer.settings.units import percent
from trainer.tasks.predictions import Predictions


def labelled_picture(row: int, names: Sequence[str], found: Predictions, source: str, *, said: bool = False) -> Html:
    """For classification. `said`: with class and answer, where the position does not show them."""
    key, sure = short(found.keys[row], 200), percent(float(found.confidence[row]))
    cell = (int(found.labels[row]), int(found.answers[row]))
    lines: list[Html] = []
    if said:
        lines += [tag("span", names[cell[0]]), tag("b", names[cell[1]])]
    lines += [tag("span", f"{sure} sure"), tag("span", key, class_="id")]
    what = f"{key}: {named_cell(cell, names)}, {sure} sure"
    title = f"{key}, loss {found.losses[row]:.2f}"
    return picture(source, lines, alt=what, title=title, kind="right" if cell[0] == cell[1] else "wrong")


def picture(source: str, lines: Sequence[Html], *, alt: str, title: str, kind: str) -> Html:
    pixels = "pixels" if source.startswith("data:image/png") else ""
    return tag("figure", image(src=source, alt=alt, class_=pixels), tag("figcaption", *lines), class_=kind, title=title)


def named_cell(cell: Cell, names: Sequence[str]) -> str:
    return f"{names[cell[0]]}, recognised" if cell[0] == cell[1] else f"{names[cell[0]]} taken for {names[cell[1]]}"

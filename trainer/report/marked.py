"""A text with the characters marked on which an answer rests. Called by the report's panels and by `trainer.predict --explain`."""

from collections.abc import Sequence
from sys import maxsize

from cluster.text import printable
from trainer.report.page import tag
from trainer.tasks.highlights import STRONGEST, Mark

_MOST, _LEAST = 0.65, 0.06
"""The part of the ground that the colour takes: where the answer rests most on a text, and where too little to be marked."""


def marked(text: str, marks: Sequence[Mark]) -> list[object]:
    """The text with its marks, the stronger the deeper, as children of `tag`. A text of which the page hides something is shown without:
    its characters have other places there."""
    parts: list[object] = []
    behind = 0
    for mark in marks if printable(text, limit=maxsize) == text else ():
        share = _MOST * mark.strength / STRONGEST
        end = min(mark.end, len(text))
        if share >= _LEAST and mark.start < end:
            shown = tag("mark", text[mark.start : end], style=f"background:rgba(240,140,0,{share:.2f});color:inherit")
            parts += [text[behind : mark.start], shown]
            behind = end
    return [*parts, text[behind:]]

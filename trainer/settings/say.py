"""Says things to people: the only way by which the commands print. Called by all command lines and by the driver.

Whatever is printed may hold foreign text (cluster.text): class names, keys, paths, messages of a run's folder that anyone may have written.
Here each character that could move the cursor, reorder or hide text becomes visible, secrets are masked, nothing is taken for markup, and
what the terminal or log cannot encode is escaped. So no caller can forget it.
"""

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from cluster.redact import redacted
from cluster.text import json_line, printable, redact
from dataio.terminal import encodable


def say(text: object) -> None:
    """Print to stdout, at once."""
    print(encodable(printable(text), sys.stdout), flush=True)


def complain(text: object) -> None:
    """Print to stderr, at once."""
    print(encodable(printable(text), sys.stderr), file=sys.stderr, flush=True)


def say_json(value: Any) -> None:
    """Print a line for programs to stdout."""
    print(encodable(json_line(redacted(value)), sys.stdout), flush=True)


class Terminal(Console):
    """A console that shows all text as `printable` does, in tables and progress lines too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*map(_without_secrets, objects), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Segments of control codes are the console's own; only in the others may anyone have written something."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(encodable(printable(segment.text), self.file), segment.style)


def _without_secrets(item: Any) -> Any:
    """A text without secrets, found before lines are wrapped."""
    match item:
        case str():
            return redact(item)
        case Text() if (masked := redact(item.plain)) != item.plain:
            return Text(masked, style=item.style)
    return item

"""The page that `finetune predict --explain FOLDER` writes of texts: each with the model's answer, and marked where that comes from. Called
by trainer.predict. Of images there is a picture each, which trainer.rank.explain draws.
"""

from pathlib import Path
from types import TracebackType
from typing import Self

from trainer.inference.texts import TextAnswer
from trainer.report.marked import marked
from trainer.report.page import frame, short, tag
from trainer.settings.units import number

PAGE = "texts.html"
LONGEST_KEY = 200


class TextPage:
    """Written as the answers come, however many they are."""

    def __init__(self, folder: Path, *, title: str) -> None:
        """Makes the folder if it is not there. OSError if nothing can be written to it."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / PAGE
        self._file = self.path.open("w", encoding="utf-8")
        begin, self._end = frame(title)
        about = "Marked: the words on which the answer rests (gradient x input), the stronger the more."
        self._file.write(begin + tag("h1", title) + tag("p", about, class_="soft"))
        self._count = 0

    def add(self, answer: TextAnswer, sentence: str) -> None:
        """`sentence`: the answer in words."""
        self._count += 1
        what = tag("div", tag("span", sentence, class_="what"), tag("span", short(answer.key, LONGEST_KEY), class_="soft"), class_="top")
        text = tag("p", *marked(answer.text, answer.marks or ()), class_="wrap")
        self._file.write(tag("section", what, text) + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._file:
            self._file.write(tag("p", f"{number(self._count)} texts", class_="soft") + self._end)

"""Holds a finished model of texts and answers texts: of .txt files, of folders of them, and of the rows of tables, JSON lines and Parquet
files.

Texts become tokens by the model's own tokenizer, and are cut or refused by the rule of its training. `trainer.predict` calls it.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataio.codecs.codec import Refusal
from dataio.codecs.text.tokens import PAD, TextFacts, Tokenizer
from dataio.foreign import MAX_TEXT_FILE_BYTES, read_regular
from dataio.formats import JUNK
from dataio.sources.texts import is_row_file, is_text_file, read_texts
from dataio.texts import padded
from trainer.export.model_folder import load_export
from trainer.rank.explain_texts import marks_of_texts
from trainer.runs.folder import RunFolder
from trainer.tasks.explained import answer_score
from trainer.tasks.highlights import STRONGEST, Mark
from trainer.tasks.score_log import calibrated_answers

BATCH = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class TextAnswer:
    """The model's answer for one text, or the reason why there is none."""

    key: str
    """The file, or the file and the row."""
    text: str = ""
    answer: Mapping[str, Any] = field(default_factory=dict)
    """In the task's own format. A classification has `predictions`: classes with their probabilities, the most probable first."""
    error: str = ""
    was_cut: bool = False
    """The text has more tokens than the model was trained with, and its beginning was answered."""
    marks: Sequence[Mark] | None = None
    """The characters that the answer comes from; None if that was not asked for."""

    def to_json(self) -> dict[str, Any]:
        """A line of `--json`."""
        found: dict[str, Any] = {"key": self.key, **({"error": self.error} if self.error else {"text": self.text, **self.answer})}
        if self.marks is not None:
            found["explanation"] = [
                {"start": mark.start, "end": mark.end, "text": self.text[mark.start : mark.end], "strength": mark.strength / STRONGEST}
                for mark in self.marks
            ]
        return {**found, "cut": True} if self.was_cut else found


@dataclass(frozen=True, kw_only=True, slots=True)
class _Text:
    key: str
    data: bytes = b""
    error: str = ""


class TextPredictor:
    """Holds the model of a model folder on its device and answers batches of texts."""

    def __init__(
        self, folder: RunFolder, *, device: torch.device | None = None, is_calibrated: bool = True, explains: bool = False
    ) -> None:
        """`explains`: answers have `marks`."""
        self._device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        exported = load_export(folder, self._device, may_be_of_texts=True)
        assert exported.texts is not None, f"{folder.location} is a model of images"
        self.task = exported.task
        self._model, self._preprocess = exported.model, exported.preprocess
        self._explains = explains
        self._temperatures = exported.temperatures if is_calibrated else {}
        texts = exported.texts
        self._tokenizer = Tokenizer(texts.tokenizer, max_tokens=texts.max_tokens, too_long=texts.too_long, where=folder.location)

    def predict(self, given: Sequence[str], *, text_column: str = "", top: int) -> Iterator[TextAnswer]:
        """The answers for what the words of a command name, in order. ValueError for what holds no text."""
        batch: list[_Text] = []
        for text in texts_of(given, text_column=text_column):
            batch.append(text)
            if len(batch) == BATCH:
                yield from self.answer(batch, top=top)
                batch = []
        yield from self.answer(batch, top=top)

    @torch.inference_mode()
    def answer(self, texts: Sequence[_Text], *, top: int) -> Iterator[TextAnswer]:
        """One TextAnswer for each text, in order."""
        facts: list[TextFacts | Refusal] = [
            Refusal(reason=text.error) if text.error else found
            for text, found in zip(texts, self._tokenizer.facts([text.data for text in texts]), strict=True)
        ]
        good = [found for found in facts if isinstance(found, TextFacts)]
        rows = self._rows(good)  # (n, T) int32
        answers = iter(self._answers(rows, top=top) if good else ())
        marks = iter(self._marks(good, rows) if good and self._explains else [None] * len(good))
        for text, found in zip(texts, facts, strict=True):
            if isinstance(found, Refusal):
                yield TextAnswer(key=text.key, error=found.reason)
            else:
                yield TextAnswer(key=text.key, text=found.text, answer=next(answers), was_cut=found.was_cut, marks=next(marks))

    def _rows(self, good: Sequence[TextFacts]) -> Tensor:
        rows = np.full((len(good), padded(max((each.length for each in good), default=1))), PAD, np.int32)
        for row, each in zip(rows, good, strict=True):
            row[: each.length] = np.frombuffer(each.stored, "<i4")
        return torch.from_numpy(rows).to(self._device)

    def _answers(self, rows: Tensor, *, top: int) -> Sequence[Mapping[str, Any]]:
        return calibrated_answers(self.task, self._model(self._preprocess(rows)), self._temperatures, top=top)

    def _marks(self, good: Sequence[TextFacts], rows: Tensor) -> Sequence[Sequence[Mark]]:
        texts = [each.text for each in good]
        return marks_of_texts(self._model, self._preprocess, self._tokenizer, texts, rows, lambda outputs: answer_score(self.task, outputs))


def texts_of(given: Sequence[str], *, text_column: str) -> Iterator[_Text]:
    """The texts that the words of a command name. ValueError if there are none."""
    if not given:
        raise ValueError("no TEXT given; name .txt files, folders of them, or tables (.csv, .tsv, .jsonl, .parquet)")
    for word in given:
        path = Path(word)
        if path.is_dir():
            files = sorted(_text_files_below(word))
            if not files:
                raise ValueError(f"{word} holds no text (.txt); name another folder, or the files themselves")
            yield from map(_of_file, files)
        elif is_row_file(path):
            for key, data, refusal in read_texts(path, text_column):
                yield _Text(key=key, data=data, error=refusal or "")
        else:
            yield _of_file(word)


def _of_file(path: str) -> _Text:
    try:
        return _Text(key=path, data=read_regular(path, MAX_TEXT_FILE_BYTES))
    except OSError as error:
        return _Text(key=path, error=f"cannot be read: {error.strerror or error}")


def _text_files_below(folder: str) -> Iterator[str]:
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name.lower() not in JUNK]
        yield from (os.path.join(where, name) for name in names if not name.startswith(".") and is_text_file(Path(name)))

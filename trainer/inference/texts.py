"""Holds a finished model of texts and answers texts: of .txt files, of folders of them, and of the rows of tables, JSON lines and Parquet
files.

Texts become tokens by the model's own tokenizer, and are cut or refused by the rule of its training. `trainer.predict` calls it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataio.codecs.codec import Refusal
from dataio.codecs.text.tokens import PAD, TextFacts, Tokenizer, padded_rows
from dataio.foreign import MAX_TEXT_FILE_BYTES, read_regular
from dataio.sources.texts import is_row_file, read_texts
from trainer.export.model_folder import load_export
from trainer.inference.text_inputs import text_files_below
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenised:
    """Texts as tokens; the row of a bad one holds a token without meaning."""

    rows: Tensor
    """(n, T) int32 on the host."""
    bad: tuple[tuple[int, str], ...]
    """(index, reason), ordered by index."""
    cut: tuple[bool, ...]
    """Which have more tokens than the model was trained with."""


class TextPredictor:
    """Holds the model of a model folder on its device and answers batches of texts: `predict` and `answer` for a command, `decode` and
    `ask`, as trainer.inference.predictor has them for images, for a job."""

    knows_novelty = False
    transparent = 0

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

    def decode(self, encoded: Sequence[bytes]) -> Tokenised:
        """Not thread-safe, but another thread may call `ask` meanwhile."""
        facts = self._tokenizer.facts(list(encoded))
        good = [found for found in facts if isinstance(found, TextFacts)]
        tokens = torch.from_numpy(padded_rows(good))
        rows = torch.zeros(len(facts), tokens.shape[1], dtype=torch.int32)
        rows[:, 1:] = PAD
        rows[[index for index, found in enumerate(facts) if isinstance(found, TextFacts)]] = tokens
        return Tokenised(
            rows=rows,
            bad=tuple((index, found.reason) for index, found in enumerate(facts) if isinstance(found, Refusal)),
            cut=tuple(isinstance(found, TextFacts) and found.was_cut for found in facts),
        )

    @torch.inference_mode()
    def ask(self, decoded: Tokenised, *, top: int) -> tuple[Sequence[Mapping[str, Any]], Sequence[bool | None]]:
        """The answer for each text, and nothing of what is unlike the training. Those of a bad text mean nothing."""
        return self._answers(decoded.rows.to(self._device), top=top), [None] * len(decoded.rows)

    def explained(self, reason: str) -> str:
        return reason

    @torch.inference_mode()
    def answer(self, texts: Sequence[_Text], *, top: int) -> Iterator[TextAnswer]:
        """One TextAnswer for each text, in order."""
        facts: list[TextFacts | Refusal] = [
            Refusal(reason=text.error) if text.error else found
            for text, found in zip(texts, self._tokenizer.facts([text.data for text in texts]), strict=True)
        ]
        good = [found for found in facts if isinstance(found, TextFacts)]
        rows = torch.from_numpy(padded_rows(good)).to(self._device)  # (n, T) int32
        answers = iter(self._answers(rows, top=top) if good else ())
        marks = iter(self._marks(good, rows) if good and self._explains else [None] * len(good))
        for text, found in zip(texts, facts, strict=True):
            if isinstance(found, Refusal):
                yield TextAnswer(key=text.key, error=found.reason)
            else:
                yield TextAnswer(key=text.key, text=found.text, answer=next(answers), was_cut=found.was_cut, marks=next(marks))

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
            files = sorted(text_files_below(word))
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

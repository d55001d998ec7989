"""Prepares texts for an export's graph, by the tokenizer beside it: the rules are those of the run's training. Called by `predictor`.

A body is a text in UTF-8. As JSON it is a string, or a list of two for a pair.
"""

import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dataio.codecs.codec import Refusal
from dataio.codecs.text.tokens import MOST_TOKENS_KNOWN, PAD, PART_BIT, TextFacts, Tokenizer, padded_rows
from dataio.foreign import json_of
from dataio.texts import BETWEEN
from deploy.serve.exports import Export, read_beside
from deploy.serve.questions import Inputs, Prepared, Question


class Texts:
    """Not thread-safe."""

    def __init__(self, export: Export) -> None:
        """ValueError if the tokenizer's file is missing, or is not the manifest's, or without the package tokenizers."""
        takes = export.manifest["input"]
        name = takes["tokenizer"]
        self._names, self._pad = tuple(takes["names"]), takes["pad_token_id"]
        self._tokenizer = Tokenizer(
            read_beside(export, name), max_tokens=takes["max_tokens"], too_long=takes["too_long"], where=f"{export.folder}/{name}"
        )

    def first(self) -> Inputs:
        return self._inputs(np.zeros((1, 1), np.int32))

    def prepared(self, questions: Sequence[Question]) -> Prepared:
        bodies = [_text_of(question) for question in questions]
        facts = [
            body if isinstance(body, Refusal) else found
            for body, found in zip(
                bodies, self._tokenizer.facts([b"" if isinstance(body, Refusal) else body for body in bodies]), strict=True
            )
        ]
        good = [found for found in facts if isinstance(found, TextFacts)]
        return Prepared(
            inputs=self._inputs(padded_rows(good)),
            bad={index: found.reason for index, found in enumerate(facts) if isinstance(found, Refusal)},
            cut=frozenset(index for index, found in enumerate(facts) if isinstance(found, TextFacts) and found.was_cut),
        )

    def _inputs(self, rows: npt.NDArray[np.int32]) -> Inputs:
        """Of rows of stored tokens, (n, T), as trainer.models.text has it."""
        is_text = rows != PAD
        known = {
            "input_ids": np.where(is_text, rows & (MOST_TOKENS_KNOWN - 1), self._pad),
            "attention_mask": is_text,
            "token_type_ids": np.where(is_text, rows >> PART_BIT, 0),
        }
        return {name: known[name].astype(np.int64) for name in self._names}


def _text_of(question: Question) -> bytes | Refusal:
    """The text as the tokenizer is given it, a pair with a NUL between."""
    if not question.is_json:
        return question.body if BETWEEN.encode() not in question.body else Refusal(reason="undecodable: a NUL, which is in no text")
    try:
        given = json_of(question.body)
    except ValueError as error:
        return Refusal(reason=f"undecodable: it is no JSON ({error})")
    texts = given if isinstance(given, list) else [given]
    if not 1 <= len(texts) <= 2 or not all(isinstance(text, str) and BETWEEN not in text for text in texts):
        return Refusal(reason=f"undecodable: {json.dumps(given):.60} is no text and no pair of texts; send a string, or a list of two")
    return BETWEEN.join(texts).encode(errors="surrogatepass")

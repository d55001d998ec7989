"""Explains a finished model's answers to texts: which characters each comes from. trainer.models.attribution finds how strongly each token
speaks for an answer, the tokenizer which characters it stands for.

`highlights` does so for the test samples that the report shows, called by explain.py at a run's end. trainer.inference.texts calls
`marks_of_texts`.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dataio.codecs.text.tokens import PAD, Tokenizer
from trainer.export.model_folder import TextExport
from trainer.learn.build import Learner
from trainer.learn.ema import Ema
from trainer.learn.gradients import evaluating
from trainer.models.architecture import one_line
from trainer.models.attribution import METHOD, NoEmbeddingsError, token_strengths
from trainer.rank.data import RankData
from trainer.report.thumbnails import rows_to_show
from trainer.tasks.explained import answer_score
from trainer.tasks.highlights import AboutMarks, Highlights, Mark, marks_of
from trainer.tasks.predictions import Predictions

BATCH = 16


def highlights(
    found: Predictions,
    learner: Learner,
    data: RankData,
    texts: TextExport,
    *,
    ema: Ema | None,
    most: int,
    on_batch: Callable[[], None] = lambda: None,
) -> Highlights:
    """Marks of `most` samples of the predictions at most, those first that the report shows first. In float32, whatever the run's
    precision."""
    split, task = data.dataset.split(found.about.split), learner.task
    rows = rows_to_show(found, split, len(task.targets[0].classes))[:most]
    rows.sort(key=lambda row: int(found.ids[row]))  # as they lie in the split
    said = found.answers[rows] if found.is_classification else None
    tokenizer = Tokenizer(texts.tokenizer, max_tokens=texts.max_tokens, too_long=texts.too_long, where=learner.config.data.tokenizer)
    marks: list[Sequence[Mark]] = []
    note = ""
    with ema.applied() if ema is not None else nullcontext(), evaluating(learner.model):
        for batch in data.loader.evaluate(found.about.split, found.ids[rows], batch_size=BATCH) if rows else ():
            answers = None if said is None else torch.from_numpy(said[len(marks) : len(marks) + len(batch.ids)]).to(learner.device)

            def score(outputs: Tensor, answers: Tensor | None = answers) -> Tensor:
                return answer_score(task, outputs, answers)

            try:
                marks += marks_of_texts(learner.model, learner.preprocess, tokenizer, split.texts(batch.ids), batch.samples, score)
            except (NoEmbeddingsError, RuntimeError) as error:  # a network of the user's own may do what has no gradient
                note, marks, rows = one_line(error), [], []
                break
            on_batch()
    of = found.about
    about = AboutMarks(step=of.step, split=of.split, dataset_fingerprint=of.dataset_fingerprint, method=METHOD, note=note)
    return Highlights(about=about, ids=found.ids[rows], marks=marks)


def marks_of_texts(
    model: nn.Module,
    preprocess: nn.Module,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    tokens: Tensor,
    score: Callable[[Tensor], Tensor],
) -> list[Sequence[Mark]]:
    """The marks of each text, whose tokens are (n, T) int32 as the loader gives them; none for a text that its tokens are not of."""
    strengths = token_strengths(model, preprocess(tokens), score).cpu().numpy()
    rows: npt.NDArray[np.int32] = tokens.cpu().numpy()
    found: list[Sequence[Mark]] = []
    for text, row, each in zip(texts, rows, strengths, strict=True):
        length = int((row != PAD).sum())
        places = tokenizer.places(text, row[:length])
        found.append(() if places is None else marks_of(places.tolist(), each[:length].tolist()))
    return found

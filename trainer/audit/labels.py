"""Finds labels that are probably wrong, by confident learning (Northcutt et al. 2021, "Confident Learning: Estimating Uncertainty in
Dataset Labels"). Pure; __main__.py calls it with the answers that folds.py collects.

Each sample has the answer of a model that was not trained on it. A class's threshold is how sure such models are of it, on average over the
samples that have its label: so a class that the models are seldom sure of does not look mislabelled as a whole. A label is doubted if the
answer is another class, and at least as sure as that class's threshold. All samples are ranked by how many times as probable the answer is
as the label, times its own probability. The ratio alone puts first what no model would take for its label, and the difference alone what
models are sure of; of labels that are wrong at random the first finds more, of those of a similar class the second (docs/audit.md).

The paper looks at all classes above their thresholds, here only the model's answer is looked at: predictions.parquet has the probability of
the answer and, as the loss, that of the label. The two differ only where the most probable class is below its threshold and another is not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainer.tasks.predictions import Predictions

TINY = 1e-12
"""The least probability that is told from none."""
Ints = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Answers:
    """What models that have not seen them say of n samples."""

    keys: Sequence[str]
    given: Ints
    """(n,) labels."""
    answers: Ints
    """(n,) classes."""
    of_answer: Values
    """(n,) probability of the answer."""
    of_given: Values
    """(n,) probability of the label."""

    @classmethod
    def of(cls, found: Predictions) -> "Answers":
        """ValueError for predictions of another task than a classification."""
        if not found.is_classification:
            raise ValueError(f"these predictions have the columns {', '.join(found.columns)}, and only those with one label can be judged")
        return cls(
            keys=found.keys,
            given=found.labels,
            answers=found.answers,
            of_answer=found.confidence.astype(np.float64),
            of_given=np.exp(-found.losses.astype(np.float64)),
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Judged:
    """Labels by how much they are doubted."""

    order: Ints
    """(n,) places in the answers, the most doubtful first; those whose answer is the label come last, the least sure first."""
    margins: Values
    """(n,): the probability of the answer less that of the label; where they are the same class, the probability below zero."""
    is_doubted: npt.NDArray[np.bool_]
    """(n,)"""
    thresholds: Values
    """(classes,): NaN for a class without samples."""

    @property
    def doubted(self) -> Ints:
        """Places of those that are doubted, the most doubtful first."""
        return self.order[self.is_doubted[self.order]]


def doubts_of(of_answer: Values, of_given: Values) -> Values:
    """(n,): how doubtful labels are of which a model gives this probability to its answer and this one to the label."""
    return 2 * np.log(np.maximum(of_answer, TINY)) - np.log(np.maximum(of_given, TINY))


def judge(found: Answers, classes: int) -> Judged:
    """Rank the labels. Every sample counts for its class's threshold, those with a wrong label too."""
    counts = np.bincount(found.given, minlength=classes)
    sums = np.bincount(found.given, weights=found.of_given, minlength=classes)
    thresholds = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)  # (classes,)
    differs = found.answers != found.given
    needed = np.nan_to_num(thresholds, nan=1.0)[found.answers]  # of a class that nobody has shown, one has to be sure
    is_doubted = differs & (found.of_answer >= needed)
    margins = np.where(differs, found.of_answer - found.of_given, -found.of_given)
    doubts = np.where(differs, doubts_of(found.of_answer, found.of_given), -found.of_given)
    order = np.lexsort((np.arange(len(doubts)), -doubts, ~differs))
    return Judged(order=order, margins=margins, is_doubted=is_doubted, thresholds=thresholds)


def joined(parts: Sequence[Answers]) -> Answers:
    """The answers of all folds, one after the other."""
    return Answers(
        keys=[key for part in parts for key in part.keys],
        given=np.concatenate([part.given for part in parts]),
        answers=np.concatenate([part.answers for part in parts]),
        of_answer=np.concatenate([part.of_answer for part in parts]),
        of_given=np.concatenate([part.of_given for part in parts]),
    )


def agreed(votes: Sequence[Answers], classes: int) -> Answers:
    """One answer from those of several models for the same samples: the class that has the most of their probability, as far as they say
    it. A model that answers another class counts 0 for it, so the answer is at most as sure as their mean. ValueError if the samples
    differ."""
    first = votes[0]
    rows = np.arange(len(first.given))
    scores = np.zeros((len(rows), classes))
    for each in votes:
        if list(each.keys) != list(first.keys) or not np.array_equal(each.given, first.given):
            raise ValueError("the models were asked about different samples; remove the folder of the folds, and begin again")
        scores[rows, each.answers] += each.of_answer / len(votes)
    answers = scores.argmax(1)
    return Answers(
        keys=first.keys,
        given=first.given,
        answers=answers,
        of_answer=scores[rows, answers],
        of_given=np.mean([each.of_given for each in votes], axis=0),
    )

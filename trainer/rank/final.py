"""What follows a run's last checkpoint where a validation split was watched: the weights to keep are put into the model, and the two splits
are read with them: validation once more, test for the first time. worker.py calls `test_kept` on every rank; finishing.py writes what it
returns.

It follows from the last checkpoint alone. A run that is killed meanwhile does it again, with the same result.
"""

from dataclasses import dataclass
from typing import Any

from cluster.beat import DECODING, EXCHANGE
from trainer.learn.build import Learner
from trainer.rank.best import BestWeights, broadcast_model
from trainer.rank.data import RankData
from trainer.rank.evaluation import Evaluator
from trainer.rank.history import numbers_of
from trainer.rank.saving import Memory
from trainer.rank.this_rank import ThisRank
from trainer.runs.choice import VALIDATION, Rule, choose, selection_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """The weights that the run keeps, as they are in the model now."""

    is_best: bool
    """They are those of the best evaluation, and no average is to be taken in their place."""
    step: int
    """After how many steps the weights were so."""
    evaluation: dict[str, Any]
    """The test split's evaluation, and the numbers of the validation split's."""
    selection: dict[str, Any]
    """How they were chosen, as summary.json has it (trainer.runs.choice)."""


def test_kept(
    me: ThisRank, data: RankData, learner: Learner, memory: Memory, evaluator: Evaluator, rule: Rule, *, steps_done: int, is_early: bool
) -> Kept:
    """Read the validation split and then the test split with the weights to keep. All ranks call it. `is_early`: the evaluations ended the
    run, and not its last step."""
    evaluations = memory.history.evaluations
    if rule.keeps_best:
        with me.heartbeat.during(EXCHANGE):
            put_best(me, learner, memory.best)
    chosen = choose(rule, evaluations).best if rule.keeps_best else evaluations[-1]
    assert chosen is not None, "the last step is always evaluated"
    step, ema = int(chosen["step"]), None if rule.keeps_best else learner.ema
    # Whoever needs the outputs for the validation split of the very weights that are exported has them here.
    validated = evaluator.final(VALIDATION, step, ema=ema)
    with me.heartbeat.during(DECODING):
        data.loader.load("test", on_group=me.heartbeat.tick)
    tested = evaluator.final("test", step, ema=ema, predictions_of=steps_done)
    return Kept(
        is_best=rule.keeps_best,
        step=step,
        evaluation={**numbers_of(validated), **tested},
        selection=selection_of(rule, evaluations, kept=chosen, is_early=is_early),
    )


def put_best(me: ThisRank, learner: Learner, best: BestWeights | None) -> None:
    """The best weights into every rank's model. Rank 0 has them."""
    if me.rank == 0:
        assert best is not None, "rank 0 keeps them"
        best.load_into(learner.model)
    if me.world_size > 1:
        broadcast_model(learner.model)

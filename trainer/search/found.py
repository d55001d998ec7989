"""Reads what the trials have left and makes the result of it (results.py). Called by __main__.py at the end."""

from collections import Counter
from collections.abc import Mapping, Sequence

from cluster.journal import read_journal
from cluster.storage import Storage
from trainer.report.compare import disagreement
from trainer.report.files import read_files
from trainer.runs.certainty import difference_interval, interval_of, paired_interval
from trainer.runs.choice import Rule
from trainer.runs.folder import RunFolder
from trainer.runs.summary import accounting
from trainer.search.importance import importance
from trainer.search.ladder import OWN, Ladder
from trainer.search.results import Cost, Gain, Search, Tried
from trainer.search.space import Space, values_of
from trainer.search.trials import Seen, Trial
from trainer.series.train import Summary
from trainer.tasks.info import TaskInfo


def search_of(
    ladder: Ladder,
    trials: Mapping[int, tuple[Trial, Seen]],
    storage: Storage,
    *,
    rule: Rule,
    info: TaskInfo,
    space: Space,
    samples: int,
) -> Search:
    """The result of a ladder that has come to its end."""
    tried = []
    for number in ladder.order():
        trial, found = trials[number]
        rung = max(0, ladder.rung_of(number))
        score = ladder.scores(rung).get(number)
        # A run may have gone further before it heard that it was to stop. What it did there is not the search's.
        is_whole = rung == len(ladder.rungs) - 1 and score is not None
        summary = found.summary or {} if is_whole else {}
        test = summary.get(info.headline.key)
        tried.append(
            Tried(
                number=number,
                name=trial.name,
                values=values_of(trial.config, space),
                epochs=ladder.rungs[rung],
                score=score if score is None or rule.measure.higher_is_better else -score,
                end="diverged" if score is None else "finished" if is_whole else "stopped",
                diverged=found.diverged or "it was never evaluated" if score is None else "",
                test=float(test) if isinstance(test, int | float) else None,
                weights_sha256=str(summary.get("weights_sha256") or ""),
            )
        )
    first = ladder.scores(0)
    best = ladder.best()
    return Search(
        info=info,
        measure=rule.measure,
        space=space,
        rungs=ladder.rungs,
        tried=tuple(tried),
        best=best,
        gain=_gain(storage, trials, best, info),
        matters=importance(space, [(values_of(trials[number][0].config, space), first[number]) for number in sorted(first)]),
        cost=Cost(epochs=ladder.spent_epochs, whole_epochs=ladder.begun * ladder.rungs[-1], samples=samples),
    )


def seconds_of(storage: Storage, names: Sequence[str]) -> dict[str, float]:
    """Of all trials' runs, by cause. `steps` are the steps and what they waited for."""
    total: Counter[str] = Counter()
    for name in names:
        parts = accounting(read_journal(storage, name), {})
        total.update({("training" if cause == "other" else cause): seconds for cause, seconds in parts.items()})
    return {cause: seconds for cause, seconds in total.items() if seconds > 0}


def _gain(storage: Storage, trials: Mapping[int, tuple[Trial, Seen]], best: int | None, info: TaskInfo) -> Gain | None:
    if best is None or best == OWN or OWN not in trials:
        return None
    summaries = [trials[number][1].summary for number in (best, OWN)]
    if summaries[0] is None or summaries[1] is None:
        return None
    return gain_of(storage, trials[best][0].name, summaries[0], trials[OWN][0].name, summaries[1], info)


def gain_of(storage: Storage, best: str, summary: Summary, own: str, other: Summary, info: TaskInfo) -> Gain | None:
    """The best run against the run with the given settings; None if one has no value."""
    head = info.headline
    one, two = summary.get(head.key), other.get(head.key)
    if not isinstance(one, int | float) or not isinstance(two, int | float):
        return None
    if interval_of(summary, head) is None or interval_of(other, head) is None:
        return Gain(best=one, own=two, interval=None)
    both, _ = disagreement(*(read_files(RunFolder(storage=storage, name=name), pictures=False) for name in (best, own)))
    if both is not None:
        return Gain(best=one, own=two, interval=paired_interval(both.only_first, both.only_second, both.count), is_paired=True)
    counts = (int(summary.get("test_count") or 0), int(other.get("test_count") or 0))
    return Gain(best=one, own=two, interval=difference_interval((one, counts[0]), (two, counts[1])) if all(counts) else None)

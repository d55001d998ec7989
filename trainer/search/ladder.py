"""Which trial is trained further, and how far: ASHA (Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning") as a function
of what the trials have measured, and of nothing else. Pure. running.py trains what it asks for.

The rungs are numbers of epochs, each `eta` times the one before, the last the whole run. Whenever there is room for one more job, the
highest rung is looked at first: if among its trials one of the best 1/eta has not been trained further, it is. Else a new trial begins.

The rule of Li et al. depends on which trial is done first, that is on the weather of the machines. Here time is virtual: a job lasts as
long as it has epochs, and results count in the order in which they would come then. So the same search decides alike on any machines, and
one that was killed decides as one that was not: it is run through again from its beginning, with the results that are there already. (Ray
Tune's ASHA decides by arrival, and Ray 2.64 does not keep the state of its schedulers: what was known of the rungs is gone with the
process.) What it costs is that a worker may wait for a slower one, which it does for the difference between the two.

Trial 0 has the settings as they were given. It is trained to the end in any case, as is the best of the others: without it nobody could say
what the search has brought.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

OWN = 0
"""The trial with the settings as they were given."""


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Job:
    """A trial's way to a rung. Ordered by when its result counts."""

    end: float
    """In virtual time, which counts epochs."""
    number: int
    """Jobs are numbered as they begin."""
    trial: int = field(compare=False)
    rung: int = field(compare=False)


Score = float | None
"""Of which more is better; None for a trial that cannot be trained further, such as one that diverged."""


def rungs_of(epochs: int, eta: int, every: int = 1, least: int = 1) -> tuple[int, ...]:
    """The rungs of a run of `epochs`, which is evaluated `every` so many: epochs / eta^k, rounded up to an evaluation, down to `least`."""
    rungs = [epochs]
    while (below := -(-rungs[-1] // eta)) < rungs[-1]:
        below = -(-below // every) * every
        if below >= rungs[-1] or below < least:
            break
        rungs.append(below)
    return tuple(reversed(rungs))


class Ladder:
    """`asked()`: the jobs that there is room for, `due()`: the one whose result counts next, `tell()`: its result. Until both have
    nothing."""

    def __init__(self, rungs: Sequence[int], *, trials: int, slots: int, eta: int, epochs: int | None = None) -> None:
        """`rungs`: epochs, rising. `trials`: how many there are, OWN included. `slots`: jobs at once. `epochs`: what all together may take;
        what is needed to train two to the end is kept back. ValueError if that is more than all."""
        if not rungs or list(rungs) != sorted({*rungs}) or min(trials, slots, rungs[0]) < 1 or eta < 2:
            raise ValueError(f"no ladder: rungs={rungs}, trials={trials}, slots={slots}, eta={eta}")
        if epochs is not None and epochs < 2 * rungs[-1]:
            raise ValueError(f"{epochs} epochs are less than two whole runs of {rungs[-1]}, which a search trains in any case")
        self.rungs, self.trials, self.eta, self.epochs = tuple(rungs), trials, eta, epochs
        self._free = slots
        self._clock = 0.0
        self._jobs = 0
        self._begun = 0
        self._spent = 0
        self._under_way: list[Job] = []
        self._scores: list[dict[int, Score]] = [{} for _ in rungs]
        self._promoted: list[set[int]] = [set() for _ in rungs]
        self._reached: dict[int, int] = {}  # by trial, the highest rung that it has begun

    # --- what is known ---

    @property
    def begun(self) -> int:
        """Trials that have begun; they are the first so many."""
        return self._begun

    @property
    def spent_epochs(self) -> int:
        """Epochs of all jobs so far, those under way included."""
        return self._spent

    def scores(self, rung: int) -> dict[int, Score]:
        """By trial."""
        return dict(self._scores[rung])

    def rung_of(self, trial: int) -> int:
        """The highest rung of which the trial's result counts; -1 for none."""
        return max((rung for rung, scores in enumerate(self._scores) if trial in scores), default=-1)

    def order(self) -> list[int]:
        """The trials that have begun, the best first: by the rung they came to, then by their score there."""
        return sorted(range(self._begun), key=lambda trial: (-self._way(trial), self._rank(trial), trial))

    def best(self) -> int | None:
        """The best of the trials that were trained to the end; None if none was."""
        return next(iter(_ranked(self._scores[-1])), None)

    # --- what happens ---

    def close(self) -> None:
        """No new trial begins any more."""
        self.trials = self._begun

    def asked(self) -> list[Job]:
        """The jobs that begin now: as many as there is room for."""
        jobs = []
        while self._free and (job := self._next()) is not None:
            jobs.append(job)
        return jobs

    def due(self) -> Job | None:
        """The job whose result counts next; None if none is under way, and so, after `asked`, the search is over."""
        return self._under_way[0] if self._under_way else None

    def tell(self, job: Job, score: Score) -> None:
        """The result of the job that is due."""
        if job != self.due():
            raise ValueError(f"{job} is not due, {self.due()} is")
        heapq.heappop(self._under_way)
        self._clock = job.end
        self._free += 1
        self._scores[job.rung][job.trial] = score

    # --- the rule ---

    def _next(self) -> Job | None:
        for rung in range(len(self.rungs) - 2, -1, -1):
            ranked = _ranked(self._scores[rung])
            best = ranked[: len(self._scores[rung]) // self.eta]
            trial = next((each for each in best if each not in self._promoted[rung]), None)
            if trial is not None and self._affords(trial, rung + 1):
                return self._promote(trial, rung)
        if self._begun < self.trials and self._affords(self._begun, 0):
            self._begun += 1
            return self._begin(self._begun - 1, 0)
        return None if self._under_way else self._last()

    def _last(self) -> Job | None:
        """What is trained to the end in any case, once the rule asks for nothing: the best of those that came furthest, and OWN."""
        if not _ranked(self._scores[-1]):
            for rung in range(len(self.rungs) - 2, -1, -1):
                if waiting := [trial for trial in _ranked(self._scores[rung]) if trial not in self._promoted[rung]]:
                    return self._promote(waiting[0], rung)
        rung = self.rung_of(OWN)
        if 0 <= rung < len(self.rungs) - 1 and self._scores[rung][OWN] is not None:
            return self._promote(OWN, rung)
        return None

    def _affords(self, trial: int, rung: int) -> bool:
        """Whether the budget has enough for this job, and then for what is trained to the end in any case: OWN, and the best of all."""
        if self.epochs is None:
            return True
        top = len(self.rungs) - 1
        begun = {**self._reached, trial: rung}
        own = self.rungs[-1] - (self.rungs[begun[OWN]] if OWN in begun else 0)
        best = 0 if any(each == top for other, each in begun.items() if other != OWN) else self.rungs[-1]
        return self._spent + self._length(rung) + own + best <= self.epochs

    def _promote(self, trial: int, rung: int) -> Job:
        self._promoted[rung].add(trial)
        return self._begin(trial, rung + 1)

    def _begin(self, trial: int, rung: int) -> Job:
        length = self._length(rung)
        self._reached[trial] = rung
        job = Job(end=self._clock + length, number=self._jobs, trial=trial, rung=rung)
        self._jobs += 1
        self._spent += length
        self._free -= 1
        heapq.heappush(self._under_way, job)
        return job

    def _length(self, rung: int) -> int:
        """Epochs from the rung below."""
        return self.rungs[rung] - (self.rungs[rung - 1] if rung else 0)

    def _way(self, trial: int) -> int:
        """The highest rung at which the trial has a score."""
        return max((rung for rung, scores in enumerate(self._scores) if scores.get(trial) is not None), default=-1)

    def _rank(self, trial: int) -> float:
        way = self._way(trial)
        score = self._scores[way][trial] if way >= 0 else None
        return 0.0 if score is None else -score


def _ranked(scores: dict[int, Score]) -> list[int]:
    """The trials that have a score, the best first; of equal ones the first."""
    known: Iterable[tuple[float, int]] = ((-score, trial) for trial, score in scores.items() if score is not None)
    return [trial for _, trial in sorted(known)]

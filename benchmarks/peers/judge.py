"""What the lives of a round say: seconds to the accuracy, samples/s, memory, and what a SIGKILL cost in seconds and in samples."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import median_interval, spread, target
from benchmarks.peers.contenders import OURS
from benchmarks.peers.watch import Life
from cluster.ledger import read_ledger

Row = dict[str, Any]
SECONDS, LOST, RATE, MEMORY = "seconds_to_accuracy", "seconds_lost_to_a_kill", "samples_per_second", "peak_rss_bytes"
TWICE, NEVER = "samples_seen_twice", "samples_never_seen"


def reached(life: Life, accuracy: float) -> float | None:
    """Seconds from the command to the first evaluation that is as good; None if there was none."""
    return next((seconds for seconds, found in life.evaluations if found >= accuracy), None)


def row_of(undisturbed: Life, disturbed: Sequence[Life], *, accuracy: float, train_samples: int) -> Row:
    """One round of one contender. `disturbed`: the life that was killed, and the one that went on. A tool that does not start again after a
    kill is no error of the benchmark: `note` says so.

    Samples/s are those between the first evaluation and the last, evaluations included, and so without start-up.
    """
    seconds = reached(undisturbed, accuracy)
    row: Row = {SECONDS: seconds, LOST: None, RATE: None, MEMORY: undisturbed.peak_rss_bytes}
    times = [when for when, _ in undisturbed.evaluations]
    if len(times) > 1 and times[-1] > times[0]:
        row[RATE] = train_samples * (len(times) - 1) / (times[-1] - times[0])
    if seconds is not None and disturbed and disturbed[0].was_killed:
        again = reached(disturbed[-1], accuracy)
        row[LOST] = None if again is None else disturbed[0].seconds + again - seconds
        if disturbed[-1].failure:
            row["note"] = f"after the kill it {disturbed[-1].failure}"
    return row


def seen_wrongly(ledger: Path, *, samples: int, epochs: int) -> Row:
    """What the epochs of a run trained on more often than once, and what never, summed over its epochs."""
    seen = Counter((record.epoch, sample) for record in read_ledger(ledger) for sample in record.ids)
    return {TWICE: seen.total() - len(seen), NEVER: samples * epochs - len(seen)}


def judged(rows: Mapping[str, Sequence[Row]], accuracy: float) -> dict[str, Any]:
    """Spread of each contender, and ours against each, round by round."""
    cases: dict[str, Any] = {}
    for name, each in rows.items():
        known = {key: [row[key] for row in each if row[key] is not None] for key in (SECONDS, LOST, RATE, MEMORY)}
        known |= {key: values for key in (TWICE, NEVER) if (values := [row[key] for row in each if key in row])}
        cases[name] = {key: spread(values) if values else None for key, values in known.items()}
        cases[name] |= {"rounds": list(each), "reached": len(known[SECONDS])}
    targets = []
    for name in rows:
        if name == OURS:
            continue
        for key, what in ((SECONDS, "seconds from the command"), (LOST, "seconds lost to a SIGKILL")):
            targets.append(less_than(rows[OURS], rows[name], key, f"{what} to {accuracy:.0%}: ours less those of {name}"))
        targets.append(as_fast_as(rows[OURS], rows[name], f"samples/s: ours over those of {name}"))
    wrong = [row[TWICE] + row[NEVER] for row in rows[OURS] if TWICE in row]
    if wrong:
        targets.append(target("samples that ours saw twice or never in an epoch, after a SIGKILL", max(wrong), at_most=0.0))
    return {"cases": cases, "targets": targets}


def less_than(own: Sequence[Row], theirs: Sequence[Row], key: str, name: str) -> dict[str, Any]:
    """The claim that ours takes no more. A peer that never got there is not compared; if ours did not, the claim fails."""
    if any(row[key] is None for row in own) and any(row[key] is not None for row in theirs):
        return target(name, None, at_most=0.0) | {"met": False, "note": "ours did not get there in every round"}
    pairs = [(one[key], other[key]) for one, other in zip(own, theirs, strict=True) if one[key] is not None and other[key] is not None]
    if not pairs:
        return target(name, None, at_most=0.0)
    differences = [one - other for one, other in pairs if one is not None and other is not None]
    interval = median_interval(differences)
    return target(name, statistics.median(differences), at_most=0.0, interval=(interval["low"], interval["high"]))


def as_fast_as(own: Sequence[Row], theirs: Sequence[Row], name: str) -> dict[str, Any]:
    pairs = [(one[RATE], other[RATE]) for one, other in zip(own, theirs, strict=True) if one[RATE] is not None and other[RATE] is not None]
    if not pairs:
        return target(name, None, at_least=1.0)
    ratios = [one / other for one, other in pairs]
    interval = median_interval(ratios)
    return target(name, statistics.median(ratios), at_least=1.0, interval=(interval["low"], interval["high"]))


def lines_of(result: Mapping[str, Any]) -> list[str]:
    lines = [f"to {result['accuracy']:.1%} of {result['test_images']} test {result['unit']}; median of {result['rounds']} rounds"]
    lines.append(f"{'':16} {'seconds':>9} {'lost to a kill':>15} {result['unit'] + '/s':>9} {'peak MB':>8}")
    for name, case in result["cases"].items():

        def shown(key: str, scale: float = 1.0, case: Mapping[str, Any] = case) -> str:
            return f"{case[key]['median'] * scale:.1f}" if case[key] else "-"

        missed = "" if case["reached"] == len(case["rounds"]) else f"   reached it in {case['reached']} of {len(case['rounds'])} rounds"
        if TWICE in case:
            missed += f"   after the kill {shown(TWICE)} seen twice, {shown(NEVER)} never"
        lines.append(f"{name:16} {shown(SECONDS):>9} {shown(LOST):>15} {shown(RATE):>9} {shown(MEMORY, 1e-6):>8}{missed}")
    return lines

"""Panel `labels`: for a task with several labels a sample, how well each is found, the weakest first, and the most frequent mistakes. The
evaluation's `labels` is a list of {name, support, predicted, average_precision, precision, recall, f1, threshold}; an unknown value
(precision of a label that was never given) is null.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.report.files import RunFiles
from trainer.report.page import NOTHING, Html, join, meter, number_or_none, section, short, table, tag
from trainer.report.panels.classes import entries_of
from trainer.runs.certainty import NOT_MEASURED
from trainer.settings.units import number, percent

SHOWN_LABELS = 100
LISTED_MISTAKES = 10

Entry = Mapping[str, Any]


def panel(run: RunFiles) -> Html:
    entries = entries_of(run.summary.get("labels"))
    return section("Labels", labels_parts(entries, run.info.unit)) if entries else NOTHING


def labels_parts(entries: Sequence[Entry], unit: str) -> Html:
    """Explanation, table, and the most frequent mistakes."""
    explained = (
        f"Weakest first. Average precision: how well the label's own {unit} are ranked before all others, whatever the threshold. "
        "Precision, recall and F1 are at the threshold: from that probability on, the label is given."
    )
    return join([tag("p", explained), labels_table(entries, unit), _mistakes(entries, unit)])


def labels_table(entries: Sequence[Entry], unit: str) -> Html:
    weakest_first = sorted(entries, key=lambda entry: (_quality(entry), str(entry.get("name"))))
    rows = [
        (
            short(entry.get("name", "?"), 200),
            _share(entry, "average_precision", is_bar=True),
            *(_share(entry, key) for key in ("precision", "recall", "f1")),
            number(_rounded(entry.get("threshold"))),
            number(_count(entry, "support")),
            number(_count(entry, "predicted")),
        )
        for entry in weakest_first[:SHOWN_LABELS]
    ]
    rest = len(entries) - len(rows)
    more = tag("p", f"and {number(rest)} stronger ones in summary.json", class_="soft") if rest > 0 else NOTHING
    head = ("label", "average precision", "precision", "recall", "F1", "threshold", unit, "given")
    return join([table(head, rows, numeric=tuple(range(1, len(head)))), more])


def _quality(entry: Entry) -> float:
    """Average precision, or F1 if that is missing; a label that no sample has is not weak, and comes last."""
    known = [value for key in ("average_precision", "f1") if (value := number_or_none(entry.get(key))) is not None]
    return known[0] if known and entry.get("support") != 0 else 2.0


def _share(entry: Entry, key: str, *, is_bar: bool = False) -> Html | str:
    value = number_or_none(entry.get(key))
    text = NOT_MEASURED if value is None else percent(value)
    return meter(value, text) if is_bar else text


def _rounded(value: object) -> float | None:
    known = number_or_none(value)
    return None if known is None else float(f"{known:.3g}")


def _count(entry: Entry, key: str) -> int | None:
    known = number_or_none(entry.get(key))
    return None if known is None else round(known)


def _mistakes(entries: Sequence[Entry], unit: str) -> Html:
    """Missed and wrongly given labels, as counts: for a rare label, a low recall is few samples."""
    missed, wrong = [], []
    for entry in entries:
        support, given, recall = _count(entry, "support"), _count(entry, "predicted"), number_or_none(entry.get("recall"))
        if support is None or given is None or (recall is None and support):
            continue
        right = round((recall or 0.0) * support)  # samples that have the label and were given it
        missed.append((support - right, support, entry))
        wrong.append((given - right, given, entry))
    listed = []
    for title, pairs, of in (
        ("Most often missed", missed, "of those that have it"),
        ("Most often given wrongly", wrong, "of those given it"),
    ):
        top = sorted(
            ((count, whole, str(entry.get("name"))) for count, whole, entry in pairs if count > 0), key=lambda each: (-each[0], each[2])
        )
        rows = [(short(name, 200), number(count), percent(count / whole)) for count, whole, name in top[:LISTED_MISTAKES]]
        if rows:
            listed.append(tag("div", tag("h3", title), table(("label", unit, of), rows, numeric=(1, 2))))
    return tag("div", *listed, class_="figures") if listed else NOTHING

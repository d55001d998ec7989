"""Panel `examples`: the worst test samples. For classification these are the wrong answers with the highest confidence; for other tasks,
the samples with the largest loss. Each is shown with the true value and the model's answer (`answers_of`).
"""

from collections.abc import Mapping, Sequence

from trainer.report.files import RunFiles, class_names, confusion_of
from trainer.report.page import NOTHING, Html, section, short, table, tag
from trainer.report.panels.answers import Answer, Names, answers_of, names_of
from trainer.report.panels.pictures import labelled_picture, picture, shown_samples, why_words
from trainer.report.thumbnails import worst_rows
from trainer.settings.units import percent
from trainer.tasks.predictions import Predictions


def panel(run: RunFiles) -> Html:
    found = run.predictions
    if found is None:
        return NOTHING
    worst = list(run.thumbnails.worst) or worst_rows(found)
    if not worst:
        return NOTHING
    return _mistakes(run, found, worst) if found.is_classification else _largest_losses(run, found, worst)


def _mistakes(run: RunFiles, found: Predictions, worst: Sequence[int]) -> Html:
    names = class_names(run.summary.get("classes"), len(confusion_of(run.summary)))
    about = "Wrong answers, the surest first. An answer's percentage is the probability that the model gave it."
    about = f"{about} {why_words(run)}".strip()
    sources = run.thumbnails.sources
    pictured = [row for row in worst if row in sources]
    if pictured:
        figures = (labelled_picture(row, names, found, run.thumbnails, said=True) for row in pictured)
        return section("Worst mistakes", tag("p", about, class_="soft"), shown_samples(run, figures, "worst"))
    rows = [
        (
            found.keys[row],
            names[found.labels[row]],
            names[found.answers[row]],
            percent(float(found.confidence[row])),
            f"{found.losses[row]:.2f}",
        )
        for row in worst
    ]
    told = tag("p", f"{about} {run.no_thumbnails}".strip(), class_="soft")
    return section("Worst mistakes", told, table(("key", "is", "is taken for", "sure", "loss"), rows, numeric=(3, 4)))


def _largest_losses(run: RunFiles, found: Predictions, worst: Sequence[int]) -> Html:
    about = f"Those {run.info.unit} on which the loss is largest: what is true, then what the model said."
    names = names_of(run.summary)
    sources = run.thumbnails.sources
    pictured = [row for row in worst if row in sources]
    if pictured:
        figures = (_picture(run, found, row, names) for row in pictured)
        notes = tag("p", " ".join(filter(None, [about, why_words(run), *run.thumbnails.notes])), class_="soft")
        return section(f"Worst {run.info.unit}", notes, shown_samples(run, figures, "worst wide"))
    said = [answers_of(found, row, names) for row in worst]
    head = [word for answer in said[0] for word in (_titled("is", answer.name), _titled("said", answer.name))]
    rows = [
        (short(found.keys[row], 200), *(word for answer in each for word in (answer.true, answer.said)), _loss(found, row))
        for row, each in zip(worst, said, strict=True)
    ]
    notes = tag("p", f"{about} {run.no_thumbnails}".strip(), class_="soft")
    return section(f"Worst {run.info.unit}", notes, table(("key", *head, "loss"), rows, numeric=(len(head) + 1,)))


def _titled(word: str, name: str) -> str:
    return f"{name}: {word}" if name else word


def _picture(run: RunFiles, found: Predictions, row: int, names: Mapping[str, Names]) -> Html:
    key, loss = short(found.keys[row], 200), f"loss {_loss(found, row)}"
    answers = answers_of(found, row, names)
    lines = [line for answer in answers for line in _lines(answer)]
    what = "; ".join(_titled(f"{answer.true}, said {answer.said}", answer.name) for answer in answers)
    return picture(
        row,
        run.thumbnails,
        [*lines, tag("span", loss), tag("span", key, class_="id")],
        alt=f"{key}: {what}, {loss}",
        title=f"{key}, {loss}",
        kind="wrong",
    )


def _lines(answer: Answer) -> list[Html]:
    """A wrong answer is red, below the true value; a right one is not repeated; a number is on the same line."""
    name = f"{answer.name}: " if answer.name else ""
    match answer.is_right:
        case True:
            return [tag("span", f"{name}{answer.true}")]
        case False:
            return [tag("span", f"{name}{answer.true}"), tag("b", answer.said)]
        case None:
            return [tag("span", f"{name}{answer.true}, said {answer.said}")]


def _loss(found: Predictions, row: int) -> str:
    return f"{float(found.losses[row]):.3g}"

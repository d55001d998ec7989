"""The command line `python -m trainer.find_rate` (`finetune find-rate`): finds a learning rate for a run before it is started, by a range
test (trainer.rank.range_test), and draws it.

It takes the run's own flags and makes the run's own checks. It writes the drawing, and like any run the converted data; no run, no
checkpoint, no weights.
"""

from dataio.leaving import Leaving
from dataio.terminal import prepare_output

if __name__ == "__main__":
    leaving = Leaving()
    prepare_output()

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from cluster.machine import usable_cpus
from dataio.manifest import image_size_of
from dataio.parquet import Dataset
from trainer.drive.capability import here, settled
from trainer.drive.data import open_data
from trainer.drive.device_rules import images_of
from trainer.drive.problems import choice_for, refuse_if_wrong, with_balance, with_length
from trainer.drive.start import with_balance as decided_balance
from trainer.drive.survey import survey
from trainer.models.vision import build_model, has_depthwise
from trainer.rank.range_test import (
    BELOW_LOWEST,
    DIVERGED,
    SMOOTHING,
    Picked,
    RangeTest,
    growing_rates,
    picked,
    range_test,
    rounded,
)
from trainer.report.page import Html, page, section, tag
from trainer.report.plots import curve_over_rates
from trainer.settings.cli import Invocation, fail, parse
from trainer.settings.fields import replaced
from trainer.settings.length import length_of
from trainer.settings.photos import choice_of
from trainer.settings.programs import program
from trainer.settings.rules import worker_count
from trainer.settings.say import Terminal, complain, say, say_json
from trainer.settings.texts import is_text, with_text_model
from trainer.settings.tree import RunConfig

PAGE = "find-rate.html"
RATES, RATES_OF_TEXTS = (1e-5, 1.0), (1e-6, 0.1)
"""The first and the last rate where no flag says them. Pretrained encoders forget at rates that convolutional networks begin with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """This command's own flags."""

    first: float | None = None
    """None: RATES, or RATES_OF_TEXTS."""
    last: float | None = None
    steps: int = 100
    out: str = PAGE
    json: bool = False


USAGE = """usage: {program} [DIR] [--SETTING VALUE ...] [--first RATE] [--last RATE] [--steps N] [--out FILE] [--json]

Find a learning rate: train for N steps with a rate that grows from --first to --last, and take a {below:g}th of the rate at which the
smoothed loss is lowest. DIR and the settings are those of the run that is to be started ({run} --help).

  --first RATE   the first learning rate ({first:g}; for texts {first_of_texts:g})
  --last RATE    the last one ({last:g}; for texts {last_of_texts:g}); the test ends before it where the loss diverges
  --steps N      steps ({steps}); more smooth the picture
  --out FILE     the drawing ({out})
  --json         print one JSON object instead of text

It runs in this process, on one device, without Ray: each batch is cut into the virtual ranks of the run (--train.virtual-ranks, or the
workers asked for), which one after the other give the gradient that its workers would. It keeps nothing but the drawing."""


def main(argv: Sequence[str]) -> int:
    """Print the rate, and return 0; 1 if the losses speak for none. Exits with 2 (SystemExit) for wrong flags or a run that could not
    start."""
    if "--help" in argv or "-h" in argv:
        default = Asked()
        say(
            USAGE.format(
                program=program("find-rate"), run=program("run"), below=BELOW_LOWEST, first=RATES[0], last=RATES[1],
                first_of_texts=RATES_OF_TEXTS[0], last_of_texts=RATES_OF_TEXTS[1], steps=default.steps, out=default.out,
            )
        )  # fmt: skip
        raise SystemExit(0)
    try:
        asked, rest = own_flags(argv)
        if Path(asked.out).parent != Path() and not Path(asked.out).parent.is_dir():
            raise ValueError(f"--out {asked.out}: there is no folder {Path(asked.out).parent}; make it, or name another file")
        invocation = parse(rest)
        found = find(replace(invocation, config=with_text_model(invocation.config)), asked)
    except (ValueError, OSError) as error:
        fail(str(error))
    return shown(found, asked)


def own_flags(argv: Sequence[str]) -> tuple[Asked, list[str]]:
    """This command's flags, and the rest. ValueError for a wrong one."""
    values: dict[str, str] = {}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--")
        if name not in ("first", "last", "steps", "out", "json") or not flag.startswith("--"):
            rest.append(word)
        elif name == "json" and not equals:
            values[name] = "true"
        elif not equals and (value := next(words, "")) == "":
            raise ValueError(f"{flag} needs a value; {program('find-rate')} --help lists them")
        else:
            values[name] = value
    default = Asked()
    asked = Asked(
        first=_number("--first", values["first"], RATES[0]) if "first" in values else None,
        last=_number("--last", values["last"], RATES[1]) if "last" in values else None,
        steps=int(_number("--steps", values["steps"], default.steps)) if "steps" in values else default.steps,
        out=values.get("out", default.out),
        json=values.get("json", "") == "true",
    )
    if asked.steps < 20:
        raise ValueError(f"--steps {asked.steps}: fewer than 20 steps say nothing; 100 is the default")
    return asked, rest


def asked_rates(asked: Asked, config: RunConfig) -> list[float]:
    """The rates to try, one a step. ValueError for flags that say none."""
    first, last = RATES_OF_TEXTS if is_text(config.model) else RATES
    first, last = first if asked.first is None else asked.first, last if asked.last is None else asked.last
    if not 0 < first < last:
        raise ValueError(f"--first {first:g} and --last {last:g}: rates grow from the first to the last, both above 0")
    return growing_rates(first, last, asked.steps)


def _number(flag: str, text: str, default: float) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{flag} {text}: that is no number; the default is {default:g}") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The test of a run's rates."""

    config: RunConfig
    device: str
    unit: str
    """What the samples are, in the plural."""
    tested: RangeTest
    picked: Picked | None
    problem: str = ""
    """Why nothing is picked."""


def find(invocation: Invocation, asked: Asked) -> Found:
    """Check the run, open its data, and test the rates. ValueError or OSError that says what stands against it."""
    config = invocation.config
    rates = asked_rates(asked, config)
    console: Console = Terminal(stderr=True)
    facts = survey(config, workers=lambda: worker_count(config) or 1, in_job=False)
    facts = replace(facts, config=choice_for(facts, invocation.given, invocation.recipes).config)
    facts, _ = with_balance(facts)
    facts, _ = with_length(facts, invocation.from_recipes)
    refuse_if_wrong(facts)
    _, dataset = open_data(facts.config, console)
    choice = choice_of(
        config, dataset.manifest, given=invocation.given, recipes=invocation.recipes, workers=worker_count(config) or 1, saved=facts.saved
    )
    balanced = decided_balance(choice.config, dataset)
    length = length_of(balanced.config, dataset.manifest, workers=worker_count(config) or 1, from_recipes=invocation.from_recipes)
    for line in (*choice.said, *balanced.said, *length.said):
        console.print(line, soft_wrap=True)
    if config.data.unlabelled:
        console.print("the test looks at the labelled images alone", soft_wrap=True)
    config = _with_virtual_ranks(length.config)
    use_gpu = torch.cuda.is_available() and config.cluster.gpus_per_worker != 0
    config = settled(
        config,
        here(use_gpus=use_gpu),
        has_depthwise=_has_depthwise(config, dataset),
        images=images_of(dataset.manifest, config.data),
        workers=1,
        tell=lambda line: console.print(line, soft_wrap=True),
    )
    device = torch.device("cuda" if use_gpu else "cpu")
    with console.status("step 0") as status:
        result = range_test(
            config, dataset, device, rates, threads=usable_cpus(), on_step=lambda step: status.update(f"step {step} of {len(rates)}")
        )
    best, problem = None, ""
    try:
        best = picked(result)
    except ValueError as error:
        problem = str(error)
    return Found(config=config, device=str(device), unit=dataset.manifest.unit, tested=result, picked=best, problem=problem)


def shown(found: Found, asked: Asked) -> int:
    """Write the drawing and say the result."""
    Path(asked.out).write_text(drawing(found))
    best = found.picked
    flag = f"--optim.lr {rounded(best.rate):g}" if best is not None else ""
    if asked.json:
        say_json(
            {
                "flag": flag, "rate": best and rounded(best.rate), "steepest": best and best.steepest, "lowest": best and best.lowest,
                "end": found.tested.end, "problem": found.problem, "page": os.path.abspath(asked.out),
                "rates": found.tested.rates[: len(found.tested.losses)], "losses": found.tested.losses,
            }
        )  # fmt: skip
    elif best is not None:
        for line in told(found, best):
            say(line)
        say(f"drawing: {asked.out}")
        say(flag)
    if best is None:
        complain(f"no rate: {found.problem}")
        return 1
    return 0


def told(found: Found, best: Picked) -> list[str]:
    """The result in sentences."""
    config, steps = found.config, len(found.tested.losses)
    parts = config.train.virtual_ranks
    cut = f" in {parts} virtual ranks" if parts > 1 else ""
    lines = [
        f"{steps} steps of {config.data.batch_size} {found.unit}{cut} on one {found.device}, {config.train.precision}; the test ended: "
        f"{found.tested.end}",
        f"the smoothed loss falls fastest at {best.steepest:.2g} and is lowest at {best.lowest:.2g}; a {BELOW_LOWEST:g}th of that is the "
        "peak rate to begin with",
    ]
    if not best.is_bounded:
        lines.append("the loss still fell at the last rate: give a higher --last")
    if config.optim.head_lr_factor != 1:
        lines.append(f"the head learnt {config.optim.head_lr_factor:g} times as fast, as it will in the run")
    return lines


def drawing(found: Found) -> str:
    """The page."""
    rates = np.array(found.tested.rates[: len(found.tested.losses)])
    best = found.picked
    curves = curve_over_rates(
        rates,
        [("loss", np.array(found.tested.losses), ":"), ("smoothed", np.array(found.tested.smoothed), "-")],
        marks=[rounded(best.rate)] if best is not None else [],
        ident="rates",
    )
    said: list[Html] = [tag("p", line) for line in (told(found, best) if best is not None else [found.problem])]
    if best is not None:
        said.append(tag("pre", f"--optim.lr {rounded(best.rate):g}"))
    rule = (
        f"A range test (Smith 2017): the rate grows by the same factor from step to step, until the loss, smoothed over about "
        f"{1 / (1 - SMOOTHING):.0f} steps, is {DIVERGED:g} times its lowest value. Picked (dashed): the rate of the lowest smoothed loss, "
        f"divided by {BELOW_LOWEST:g}."
    )
    return page("Learning rates", section("Loss by learning rate", *said, tag("figure", curves), tag("p", rule, class_="soft")))


def _with_virtual_ranks(config: RunConfig) -> RunConfig:
    parts = config.train.virtual_ranks or worker_count(config) or 1
    found: RunConfig = replaced(config, "train.virtual_ranks", parts)
    return found


def _has_depthwise(config: RunConfig, dataset: Dataset) -> bool:
    if is_text(config.model):
        return False
    blank = replace(config.model, weights="none", stem="native")
    return has_depthwise(build_model(blank, classes=2, seed=0, image_hw=image_size_of(dataset.manifest, config.data)))


if __name__ == "__main__":
    leaving.by(lambda: main(sys.argv[1:]))

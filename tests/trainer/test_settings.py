"""The rules that stand beside the settings: each is kept, says value, rule and fix, and none is written in a way that nobody reads."""

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Annotated, Any

import pytest
from annotated_types import Ge, Interval, MaxLen
from hypothesis import given
from hypothesis import strategies as st

from dataio.config import DataConfig, targets_of
from dataio.schema import KINDS
from tests.trainer.configs import configs
from trainer.settings.fields import declared, replaced, settings
from trainer.settings.rules import field_problem, validate
from trainer.settings.toml import from_toml
from trainer.settings.tree import OptimConfig, RunConfig, TaskConfig
from trainer.settings.values import loss_weights, task_of, workers_of

NUMBERS = [key for key, setting in declared(RunConfig).items() if type(setting.default) in (int, float)]


# --- the rules of fields --------------------------------------------------------------------------------------------------------------


@given(configs())
def test_any_config_is_judged(config: RunConfig) -> None:
    """Every rule of every field is one that its reader knows, else an AssertionError ends this."""
    with suppress(ValueError):
        validate(config)


@given(key=st.sampled_from(NUMBERS), value=st.one_of(st.integers(), st.floats(), st.just(10**400)))
def test_a_number_is_refused_by_its_name_or_taken(key: str, value: float) -> None:
    problem = field_problem(declared(RunConfig)[key], value)
    assert problem is None or problem.startswith(f"{key}=")
    if isinstance(value, float) and not math.isfinite(value):
        assert problem is not None


@pytest.mark.parametrize("key", NUMBERS)
def test_every_number_has_a_range_and_its_default_is_in_it(key: str) -> None:
    setting = declared(RunConfig)[key]
    assert field_problem(setting, setting.default) is None
    assert field_problem(setting, -1000) is not None


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (OptimConfig(lr=0.0), "optim.lr=0 must be above 0; 0.02 is the default"),
        (OptimConfig(lr=math.nan), "optim.lr=nan must be above 0; 0.02 is the default"),
        (OptimConfig(momentum=1.0), "optim.momentum=1 must be at least 0 and below 1; 0.9 is usual"),
        (OptimConfig(weight_decay=-1.0), "optim.weight_decay=-1 must be at least 0; 0 turns it off"),
        (OptimConfig(warmup_steps=-1), "optim.warmup_steps=-1 must be at least 0; 0 has no warm-up"),
        (OptimConfig(final_lr_fraction=1.5), "optim.final_lr_fraction=1.5 must be at least 0 and at most 1; it is a fraction of optim.lr"),
        (OptimConfig(head_lr_factor=0.0), "optim.head_lr_factor=0 must be above 0; 1 trains the head as fast as the rest"),
        (OptimConfig(label_smoothing=1.0), "optim.label_smoothing=1 must be at least 0 and below 1; 0 turns it off, 0.1 is usual"),
        (OptimConfig(clip_norm=math.inf), "optim.clip_norm=inf must be at least 0; 0 does not clip"),
        (
            OptimConfig(nesterov=True, name="adamw"),
            "optim.nesterov=true belongs to SGD, but optim.name=adamw; use --optim.no-nesterov or --optim.name sgd",
        ),
        (
            OptimConfig(nesterov=True, momentum=0.0),
            "optim.nesterov=true needs momentum, but optim.momentum=0; use --optim.momentum 0.9 or --optim.no-nesterov",
        ),
    ],
)
def test_an_optimiser_that_cannot_be_built_is_refused_by_value_rule_and_fix(config: OptimConfig, said: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        validate(RunConfig(optim=config))
    assert str(caught.value) == said


def test_each_item_of_a_tuple_is_judged() -> None:
    assert field_problem(declared(RunConfig)["data.std"], (0.5, 0.5, -1.0)) == "data.std=-1 must be above 0; the images are divided by it"


def test_a_rule_that_nobody_keeps_is_our_mistake() -> None:
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Odd:
        length: Annotated[str, MaxLen(3)] = ""

    with pytest.raises(AssertionError, match="is no rule"):
        field_problem(declared(Odd)["length"], "long")


def test_what_a_table_says_holds_for_its_settings_and_what_both_say_is_kept() -> None:
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Inner:
        depth: Annotated[int, Interval(ge=0, lt=9), "0 is flat"] = 3

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Outer:
        inner: Annotated[Inner, Ge(2)] = Inner()

    setting = declared(Outer)["inner.depth"]
    assert (setting.type, setting.default) == (int, 3)
    assert field_problem(setting, 1) == "inner.depth=1 must be at least 2 and at least 0 and below 9; 0 is flat"


def test_settings_and_fields_have_the_same_names_in_the_same_order() -> None:
    config: Any = RunConfig()
    assert list(settings(config)) == list(declared(RunConfig))
    for key, value in settings(config).items():
        assert declared(RunConfig)[key].default == value
        assert settings(replaced(config, key, "other"))[key] == "other"


# --- settings whose text has a form ---------------------------------------------------------------------------------------------------

NAMES = st.text(st.characters(codec="utf-8", exclude_characters=",:="), min_size=1).map(str.strip).filter(bool)


@given(st.dictionaries(NAMES, st.floats(min_value=0, exclude_min=True, allow_infinity=False)))
def test_loss_weights_are_read_as_they_are_written(weights: dict[str, float]) -> None:
    text = ",".join(f"{name}={weight!r}" for name, weight in weights.items())
    assert loss_weights(text) == weights
    validate(RunConfig(task=TaskConfig(weights=text)))


@given(st.dictionaries(NAMES, st.sampled_from(["", *KINDS])))
def test_targets_are_read_as_they_are_written(targets: dict[str, str]) -> None:
    text = ", ".join(f"{name}:{kind}" if kind else name for name, kind in targets.items())
    assert targets_of(text) == tuple(targets.items())
    validate(RunConfig(data=DataConfig(targets=text)))


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("[task]\nweights = 'age'\n", "task.weights='age': 'age' is no NAME=WEIGHT; write them separated by commas"),
        ("[task]\nweights = 'age=1,'\n", "task.weights='age=1,': '' is no NAME=WEIGHT"),
        ("[task]\nweights = '=1'\n", "task.weights='=1': '=1' is no NAME=WEIGHT"),
        ("[task]\nweights = 'age=old'\n", "task.weights='age=old': 'old' is no number; give age a weight above 0, such as age=1"),
        ("[task]\nweights = 'age=0'\n", "task.weights='age=0': age=0 must be above 0 and finite; 1 is the default"),
        ("[task]\nweights = 'age=nan'\n", "task.weights='age=nan': age=nan must be above 0 and finite"),
        ("[task]\nweights = 'age=inf'\n", "task.weights='age=inf': age=inf must be above 0 and finite"),
        ("[task]\nweights = 'a=1,b=2,a=3'\n", "task.weights='a=1,b=2,a=3' names a twice; give each head one weight"),
        ("[task]\nthreshold = 1\n", "task.threshold=1 must be above 0 and below 1; 0.5 is the default"),
        ("[task]\nthreshold = 0\n", "task.threshold=0 must be above 0 and below 1; 0.5 is the default"),
        ("[task]\nname = 'multi-label'\n", "task.name='multi-label'; did you mean multilabel? it must be one of auto, classification,"),
        ("[task]\nname = 'my task:X'\n", "task.name='my task:X' names no class; write module:Class, such as my_package.my_task:MyTask"),
        ("[task]\nname = 'a.b:'\n", "task.name='a.b:' names no class; write module:Class"),
        ("[data]\ntargets = 'a,,b'\n", "data.targets='a,,b' names no column in ''; write NAME or NAME:KIND, separated by commas"),
        ("[data]\ntargets = ':label'\n", "data.targets=':label' names no column in ':label'"),
        ("[data]\ntargets = 'a:lable'\n", "data.targets='a:lable': 'lable' is no kind of target; it must be one of label, labels, number"),
        ("[data]\ntargets = 'a,b:number,a:label'\n", "data.targets='a,b:number,a:label' names a twice; name each column once"),
        (
            "[data]\nvalidation_fraction = 1\n",
            "data.validation_fraction=1 must be at least 0 and below 1; it is a fraction of the training",
        ),
    ],
)
def test_a_mistake_in_such_a_text_says_what_is_wrong_and_what_to_do(toml: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        validate(from_toml(toml))
    assert str(caught.value).startswith(said)


def test_a_task_from_outside_is_a_module_and_a_class() -> None:
    assert task_of("my.tasks:Ordinal") == ("my.tasks", "Ordinal")
    assert task_of("multitask") == "multitask"
    validate(RunConfig(task=TaskConfig(name="my.tasks:Ordinal")))


def test_workers_are_a_number_a_range_or_auto() -> None:
    assert (workers_of("3"), workers_of("1:4"), workers_of("auto")) == ((3, 3), (1, 4), None)


def test_a_broken_rule_about_workers_is_told_once() -> None:
    with pytest.raises(ValueError, match="workers=many") as caught:
        validate(replace(RunConfig(), workers="many"))
    assert str(caught.value).count("workers=many") == 1

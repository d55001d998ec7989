"""The ladder is ASHA by virtual time, a space is covered evenly, what mattered is told from chance, and a search is a function of what its
runs measure: killed anywhere and given again it ends in the same file. The runs are real processes in the place of `trainer.run`;
tests/e2e/test_search.py has real ones."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.texts import make_model, rows, write_csv
from trainer.runs.choice import rule_of
from trainer.search import running as running_module
from trainer.search.__main__ import main
from trainer.search.importance import FEWEST, importance
from trainer.search.ladder import OWN, Job, Ladder, Score, rungs_of
from trainer.search.page import drawn
from trainer.search.results import Cost, Gain, Search, Tried, sentences, to_json
from trainer.search.space import Axis, load_space, point, space_names, space_of, trial_config, values_of
from trainer.search.trials import Seen, seen_in
from trainer.series.train import words_of
from trainer.settings.fields import replaced, settings
from trainer.settings.rules import validate
from trainer.settings.toml import from_toml, load
from trainer.settings.tree import RunConfig
from trainer.tasks.info import CLASSIFICATION, Measure

SAMPLE = Path(__file__).resolve().parents[2] / "dataio" / "samples" / "fashion_mnist"
DATA_ROOT = SAMPLE.parent
"""Nothing is converted into it."""


# --- the ladder -------------------------------------------------------------------------------------------------------------------------


def climbed(ladder: Ladder, score: Callable[[int, int], Score]) -> list[tuple[int, int]]:
    """All jobs (trial, rung) in the order in which they began."""
    begun: list[Job] = []
    under_way = 0
    while True:
        asked = ladder.asked()
        begun += asked
        under_way += len(asked)
        if (job := ladder.due()) is None:
            assert under_way == 0
            return [(job.trial, job.rung) for job in begun]
        ladder.tell(job, score(job.trial, job.rung))
        under_way -= 1


@given(
    scores=st.lists(st.one_of(st.none(), st.floats(0, 1, allow_subnormal=False)), min_size=1, max_size=40),
    slots=st.integers(1, 5),
    eta=st.integers(2, 4),
    epochs=st.integers(1, 30),
    seed=st.integers(0, 9),
)
def test_every_search_ends_with_the_best_and_the_given_settings_trained_to_the_end(
    scores: list[Score], slots: int, eta: int, epochs: int, seed: int
) -> None:
    noise = random.Random(seed)
    at = {(trial, rung): value if value is None else value + noise.random() for rung in range(9) for trial, value in enumerate(scores)}
    rungs = rungs_of(epochs, eta)
    ladder = Ladder(rungs, trials=len(scores), slots=slots, eta=eta)
    jobs = climbed(ladder, lambda trial, rung: at[trial, rung])
    assert len(set(jobs)) == len(jobs), "nothing is trained twice"
    for trial in range(len(scores)):
        assert [rung for each, rung in jobs if each == trial] == list(range(ladder.rung_of(trial) + 1)), "from rung to rung"
    assert {trial for trial, rung in jobs if rung == 0} == set(range(len(scores)))
    if scores[OWN] is not None:
        assert (OWN, len(rungs) - 1) in jobs
    if any(score is not None for score in scores):
        assert ladder.best() == ladder.order()[0]
        assert ladder.best() is not None
    else:
        assert ladder.best() is None


@given(trials=st.integers(1, 30), slots=st.integers(1, 6), seed=st.integers(0, 99))
def test_no_more_jobs_at_once_than_there_is_room_for(trials: int, slots: int, seed: int) -> None:
    noise = random.Random(seed)
    ladder, running = Ladder((1, 3, 9), trials=trials, slots=slots, eta=3), 0
    while True:
        running += len(ladder.asked())
        assert running <= slots
        if (job := ladder.due()) is None:
            break
        ladder.tell(job, noise.random())
        running -= 1


def test_with_one_slot_it_is_the_rule_of_the_paper() -> None:
    """Written again from Algorithm 2 of Li et al. 2020, for one worker, without what is trained at the end in any case."""
    noise, eta, rungs, trials = random.Random(3), 3, 3, 30
    score = {(trial, rung): noise.random() for trial in range(trials) for rung in range(rungs)}
    done: list[dict[int, float]] = [{} for _ in range(rungs)]
    expected, new = [], 0

    def get_job() -> tuple[int, int] | None:
        nonlocal new
        for k in reversed(range(rungs - 1)):
            top = sorted(done[k], key=lambda trial: -done[k][trial])[: len(done[k]) // eta]
            if promotable := [trial for trial in top if (trial, k + 1) not in expected]:
                return promotable[0], k + 1
        new += 1
        return (new - 1, 0) if new <= trials else None

    while (job := get_job()) is not None:
        expected.append(job)
        done[job[1]][job[0]] = score[job]
    jobs = climbed(Ladder((1, 3, 9), trials=trials, slots=1, eta=eta), lambda trial, rung: score[trial, rung])
    assert jobs[: len(expected)] == expected
    assert set(jobs[len(expected) :]) <= {(OWN, rung) for rung in range(rungs)}


@given(slots=st.integers(1, 4), many=st.integers(13, 30))
def test_more_trials_begin_as_fewer_did(slots: int, many: int) -> None:
    noise = random.Random(1)
    score = {(trial, rung): noise.random() for trial in range(many) for rung in range(3)}
    few, more = (climbed(Ladder((1, 2, 4), trials=n, slots=slots, eta=2), lambda trial, rung: score[trial, rung]) for n in (12, many))
    last = few.index((11, 0))
    assert more[: last + 1] == few[: last + 1]


@given(trials=st.integers(2, 40), budget=st.integers(18, 200), slots=st.integers(1, 4), seed=st.integers(0, 50))
def test_a_budget_is_kept(trials: int, budget: int, slots: int, seed: int) -> None:
    noise = random.Random(seed)
    ladder = Ladder((1, 3, 9), trials=trials, slots=slots, eta=3, epochs=budget)
    jobs = climbed(ladder, lambda trial, rung: noise.random())
    assert sum({0: 1, 1: 2, 2: 6}[rung] for _, rung in jobs) == ladder.spent_epochs <= budget
    assert (OWN, 2) in jobs
    assert [trial for trial, rung in jobs if rung == 0] == list(range(ladder.begun))


def test_what_cannot_be_a_ladder_is_refused() -> None:
    with pytest.raises(ValueError, match="17 epochs are less than two whole runs of 9"):
        Ladder((1, 3, 9), trials=4, slots=1, eta=3, epochs=17)
    for wrong in ({"rungs": ()}, {"rungs": (3, 1)}, {"trials": 0}, {"slots": 0}, {"eta": 1}):
        with pytest.raises(ValueError, match="no ladder"):
            Ladder(**{"rungs": (1, 2), "trials": 2, "slots": 1, "eta": 2, **wrong})  # type: ignore[arg-type]
    ladder = Ladder((1,), trials=2, slots=2, eta=2)
    _, second = ladder.asked()
    with pytest.raises(ValueError, match="is not due"):
        ladder.tell(second, 1.0)


@pytest.mark.parametrize(
    ("epochs", "eta", "every", "least", "rungs"),
    [
        (9, 3, 1, 1, (1, 3, 9)),
        (10, 3, 1, 1, (1, 2, 4, 10)),
        (4, 3, 1, 1, (1, 2, 4)),
        (1, 3, 1, 1, (1,)),
        (27, 3, 1, 2, (3, 9, 27)),
        (10, 3, 2, 1, (2, 4, 10)),
        (10, 3, 10, 1, (10,)),
    ],
)
def test_rungs_are_parts_of_a_whole_run_at_which_it_is_evaluated(
    epochs: int, eta: int, every: int, least: int, rungs: tuple[int, ...]
) -> None:
    assert rungs_of(epochs, eta, every, least) == rungs


# --- the space --------------------------------------------------------------------------------------------------------------------------

SPACE = """
[optim.lr]
times = [0.1, 10.0]
[optim.weight_decay]
low = 0.0
high = 0.01
scale = "linear"
[data.pad]
low = 1
high = 8
[data.policy]
values = ["none", "trivial"]
"""


def axes_of(text: str, base: RunConfig | None = None) -> tuple[Axis, ...]:
    return space_of(text, base or RunConfig(), origin="space.toml")


def test_trial_0_has_the_given_settings_and_the_others_change_only_what_is_searched() -> None:
    base, space = RunConfig(), axes_of(SPACE)
    assert trial_config(base, space, 0, 7) == base
    for trial in range(1, 50):
        made = trial_config(base, space, trial, 7)
        changed = {key for key, value in settings(made).items() if value != settings(base)[key]}
        assert changed <= {axis.key for axis in space}
        assert 0.002 <= made.optim.lr <= 0.2
        assert 0 <= made.optim.weight_decay <= 0.01
        assert 1 <= made.data.pad <= 8
        assert isinstance(made.data.pad, int)
        assert made.data.policy in ("none", "trivial")
        assert f"{made.optim.lr:.3g}" == f"{made.optim.lr:.9g}", "nobody reads more than three digits"


@given(seed=st.integers(0, 1000), count=st.integers(16, 64))
def test_trials_cover_each_axis_evenly(seed: int, count: int) -> None:
    space = axes_of(SPACE)
    points = [point(trial, seed, space) for trial in range(1, count + 1)]
    for axis in range(len(space)):
        places = sorted(each[axis] for each in points)
        gaps = [after - before for before, after in zip([places[-1] - 1, *places], places, strict=False)]
        assert max(gaps) < 6 / count, "no hole of six times the mean distance"
        assert all(0 <= place < 1 for place in places)


@given(
    place=st.floats(0, 1, exclude_max=True), low=st.floats(1e-6, 1), factor=st.floats(1.5, 1e4), scale=st.sampled_from(["log", "linear"])
)
def test_a_place_on_an_axis_is_found_again(place: float, low: float, factor: float, scale: Any) -> None:
    axis = Axis(key="optim.lr", low=low, high=low * factor, scale=scale)
    found = axis.at(place)
    assert axis.low <= found <= axis.high
    back = axis.place(found)
    assert back is not None
    assert -1e-9 <= back <= 1 + 1e-9
    # Three digits are off by half a percent of the value at most.
    spread = 0.006 * found / (axis.high - axis.low) if scale == "linear" else 0.006 / math.log(factor)
    assert abs(back - place) <= spread + 1e-9


def test_every_shipped_space_gives_settings_that_a_run_takes() -> None:
    assert space_names() == ["augmentation", "rates", "texts"]
    images = replaced(RunConfig(), "data.path", str(SAMPLE))
    texts = replaced(load("texts", RunConfig()), "model.name", "hf/encoder")
    for name, base in (("augmentation", images), ("rates", images), ("rates", texts), ("texts", texts)):
        space = load_space(name, base)
        for trial in range(40):
            validate(trial_config(base, space, trial, 0), workers=1)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "names no setting to search"),
        ("[optim", "is not valid TOML"),
        ("[optim.rate]\nlow=1", r"optim.rate is no setting; did you mean"),
        ("[optim]\nlr = 3", r"optim.lr = 3 is one value"),
        ("optim = 3", r"optim = 3, but optim is a table"),
        ("[train.seed]\nvalues=[1,2]", "a seed that did well by chance is no better setting"),
        ("[train.epochs]\nlow=1\nhigh=3", "the search chooses how long each trial is trained"),
        ("[data.path]\nvalues=['a','b']", "it does not change what the model learns"),
        ("[cluster.keep_checkpoints]\nlow=1\nhigh=3", "it does not change what the model learns"),
        ("[optim.lr]\nlow=1", "it must have values, or times, or low and high"),
        ("[optim.lr]\nlow=1\nhigh=2\ntimes=[1,2]", "it must have values, or times, or low and high"),
        ("[optim.lr]\nlo=1\nhigh=2", "lo is unknown; did you mean low"),
        ("[optim.lr]\nlow=2\nhigh=1", "the smaller number comes first"),
        ("[optim.lr]\nlow=0\nhigh=1", "0 has no logarithm"),
        ("[optim.lr]\nlow=nan\nhigh=1", "they must be numbers"),
        ("[optim.lr]\nlow=0.1\nhigh=1\nscale='cubic'", "it must be \"log\" or \"linear\""),
        ("[optim.lr]\ntimes=[1]", "it must be two multiples"),
        ("[optim.warmup_steps]\ntimes=[1,2]", "which is 0 in this run; write low and high"),
        ("[optim.lr]\nvalues=[0.1]", "leaves nothing to choose"),
        ("[optim.lr]\nvalues=[0.1,0.1]", "has one of them twice"),
        ("[optim.lr]\nvalues=['a','b']", "it must be a number"),
        ("[data.policy]\nvalues=['none','autoaugment']", "must be one of none, trivial, rand"),
        ("[data.policy]\nlow=1\nhigh=2", "is no number; write values"),
        ("[data.pad]\nlow=1.5\nhigh=4", "is a whole number"),
        ("a=" + "[" * 5000, "space.toml"),
    ],
)  # fmt: skip
def test_a_space_that_is_none_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        axes_of(text)


def test_a_space_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--space rate is no space; did you mean rates\? shipped: augmentation, rates, texts"):
        load_space("rate", RunConfig())
    with pytest.raises(ValueError, match="cannot be read"):
        load_space(str(tmp_path / "none.toml"), RunConfig())
    (tmp_path / "latin.toml").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        load_space(str(tmp_path / "latin.toml"), RunConfig())


# --- what mattered ----------------------------------------------------------------------------------------------------------------------


def test_what_decides_the_scores_is_found_and_what_does_not_is_called_chance() -> None:
    space = axes_of(SPACE)
    trials: list[tuple[dict[str, Any], float | None]] = []
    for trial in range(1, 25):
        values = values_of(trial_config(RunConfig(), space, trial, 0), space)
        place = space[0].place(values["optim.lr"])
        assert place is not None
        trials.append((values, 0.9 - (place - 0.4) ** 2))
    found = {each.key: each for each in importance(space, trials)}
    assert found["optim.lr"].share > 0.95
    assert found["optim.lr"].chance < 0.01
    assert all(found[key].share < 0.5 for key in found if key != "optim.lr")
    assert importance(space, trials[: FEWEST - 1]) == ()
    assert importance(space, [(values, 0.5) for values, _ in trials]) == ()
    assert importance(space, [(values, None) for values, _ in trials]) == ()
    assert importance(space, [*trials[:-1], (trials[-1][0], None)]), "one that diverged is the worst"


# --- scores -----------------------------------------------------------------------------------------------------------------------------

BEST = rule_of(replaced(RunConfig(), "train.select", "best").train, CLASSIFICATION)
LAST = rule_of(replaced(RunConfig(), "train.select", "last").train, CLASSIFICATION)


def evaluation(epoch: int, accuracy: float, split: str = "validation") -> dict[str, Any]:
    return {"event": "evaluation", "step": 10 * epoch, "epoch": float(epoch), "split": split, f"{split}_accuracy": accuracy}


def test_a_score_is_known_once_the_rung_is_evaluated_and_counts_nothing_after_it() -> None:
    events = [evaluation(1, 0.5), evaluation(2, 0.4), evaluation(2, 0.99, "test"), evaluation(3, 0.9), evaluation(2, 0.4)]
    found = seen_in(events, None, BEST)
    assert found.score(BEST, 2, 4) == (0.5, True), "the best weights are those that are kept"
    assert found.score(LAST, 2, 4) == (0.4, True)
    assert found.score(BEST, 3, 4) == (0.9, True)
    assert found.score(BEST, 4, 4) == (None, False)
    assert seen_in(events[:1], None, BEST).score(BEST, 2, 4) == (None, False)
    assert seen_in([*events, evaluation(4, 0.7)], None, BEST).score(BEST, 4, 4) == (None, False), "the end is known by the summary"
    assert seen_in([*events, evaluation(4, 0.7)], {"status": "finished"}, LAST).score(LAST, 4, 4) == (0.7, True)


def test_a_trial_that_diverged_is_known_and_has_no_score() -> None:
    events = [evaluation(1, 0.5), {"event": "run_failed", "kind": "numbers", "message": "the loss is nan"}]
    found = seen_in(events, None, BEST)
    assert found.diverged == "the loss is nan"
    assert found.score(BEST, 2, 4) == (None, True)
    assert found.score(BEST, 1, 4) == (0.5, True), "what it did after the rung does not count"
    assert seen_in([*events[:1], {"event": "run_failed", "kind": "infrastructure"}], None, BEST).score(BEST, 2, 4) == (None, False)


def test_a_run_that_its_own_patience_ended_has_a_score_at_every_rung() -> None:
    found = seen_in([evaluation(1, 0.5), evaluation(2, 0.4)], {"status": "finished"}, BEST)
    assert found.score(BEST, 3, 9) == found.score(BEST, 9, 9) == (0.5, True)


# --- what it says -----------------------------------------------------------------------------------------------------------------------


def searched_with(*, best: int | None, gain: Gain | None, measure: Measure = CLASSIFICATION.headline, diverged: int = 0) -> Search:
    space = axes_of("[optim.lr]\nlow=0.01\nhigh=0.1\n[data.policy]\nvalues=['none','<b>']".replace("<b>", "trivial"))
    tried = [
        Tried(number=number, name=f"trial-{number:03d}", values={"optim.lr": 0.02 * (number + 1), "data.policy": "none"}, epochs=4,
              score=None if number >= 3 - diverged else 0.9 - 0.01 * number, end="diverged" if number >= 3 - diverged else "finished",
              diverged="<i>nan</i>" if number >= 3 - diverged else "", test=0.88)
        for number in range(3)
    ]  # fmt: skip
    return Search(
        info=CLASSIFICATION, measure=measure, space=space, rungs=(1, 2, 4), tried=tuple(tried), best=best, gain=gain, matters=(),
        cost=Cost(epochs=7, whole_epochs=12, samples=100),
    )  # fmt: skip


def test_what_a_search_says() -> None:
    sure = Gain(best=0.93, own=0.9, interval=(0.01, 0.05), is_paired=True)
    first, second, *_ = sentences(searched_with(best=1, gain=sure))
    assert "test split, which chose nothing: accuracy 93.00 % against 90.00 %, 3.0 points better (1.0 to 5.0)" in first
    assert second == "Its settings: optim.lr 0.04, data.policy none."
    chance = Gain(best=0.905, own=0.9, interval=(-0.01, 0.02))
    assert "+0.5 points (-1.0 to 2.0 %), which may be chance" in sentences(searched_with(best=1, gain=chance))[0]
    worse = Gain(best=0.85, own=0.9, interval=(-0.09, -0.01))
    assert "5.0 points worse (-9.0 to -1.0)" in sentences(searched_with(best=1, gain=worse))[0]
    assert "The search has found nothing better" in sentences(searched_with(best=0, gain=None))[0]
    assert sentences(searched_with(best=None, gain=None, diverged=3)) == [
        "none of the 3 trials could be trained to the end: 3 diverged; lower optim.lr"
    ]
    assert (
        sentences(searched_with(best=0, gain=None))[-1]
        == "It trained 7 epochs, 58 % of the 12 that all trials would have needed to the end."
    )
    assert json.loads(json.dumps(to_json(searched_with(best=1, gain=sure))))["gain"]["interval"] == [0.01, 0.05]


def test_the_page_escapes_what_runs_said_and_needs_no_script() -> None:
    html = drawn(searched_with(best=0, gain=None, diverged=1), {"training": 50.0, "start_up": 10.0}, 60.0)
    assert "&lt;i&gt;nan&lt;/i&gt;" in html
    assert "<i>nan" not in html
    assert "<script" not in html
    assert html.count("<svg") == 1
    assert drawn(searched_with(best=None, gain=None, diverged=3), {}, 0.0).count("<svg") == 0


# --- going on ---------------------------------------------------------------------------------------------------------------------------


def test_a_search_of_another_kind_under_the_same_name_is_refused(
    pretended: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(undisturbed, pretended / "runs" / "s")
    for words, differs in (
        (["--optim.momentum", "0.5"], "optim.momentum"),
        (["--space", "augmentation", "--search-seed", "4"], "data.erase, data.flip, data.policy, optim.head_lr_factor"),
        (["--eta", "3"], "eta"),
    ):
        with pytest.raises(SystemExit):
            search(pretended, *words)
        said = " ".join(capsys.readouterr().err.split())
        assert f"was begun with other {differs}" in said
        assert "give another --run NAME, or leave it out" in said


PRETENDED = """
import hashlib, json, os, pathlib, signal, sys, time, tomllib
name, storage = sys.argv[sys.argv.index("--run") + 1], sys.argv[sys.argv.index("--storage") + 1]
config = tomllib.load(open(sys.argv[sys.argv.index("--config") + 1], "rb"))
folder = pathlib.Path(storage, name)
folder.mkdir(parents=True, exist_ok=True)
number, lr, epochs = int(name[-3:]), config["optim"]["lr"], config["train"]["epochs"]
control = pathlib.Path(os.environ["PRETENDED"])
def tell(event, **fields):
    with open(folder / "journal.jsonl", "a") as file:
        file.write(json.dumps({"time": time.time(), "writer": "driver-g0000", "event": event, **fields}) + "\\n")
saved = folder / "saved"
done = int(saved.read_text()) if saved.exists() else 0
tell("run_started", pid=os.getpid())
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
if (control / f"refuses-{number}").exists():
    print("said by", name); sys.exit(2)
for epoch in range(done + 1, epochs + 1):
    if (control / f"dies-{number}-{epoch}").exists():
        (control / f"dies-{number}-{epoch}").unlink()
        os.kill(os.getpid(), 9)
    while (control / f"holds-{number}-{epoch}").exists() and not stop:
        (control / "held").touch()
        time.sleep(.01)
    if stop:
        tell("run_stopped"); sys.exit(143)
    if (control / f"diverges-{number}").exists():
        tell("run_failed", kind="numbers", message="the loss is nan"); sys.exit(1)
    score = round(0.5 + 0.1 * epoch / epochs - abs(lr - 0.1), 6)
    tell("evaluation", step=10 * epoch, epoch=float(epoch), split="validation", validation_accuracy=score, validation_loss=1.0)
    saved.write_text(str(epoch))
    if epoch < epochs:
        # As a run does: it trains on, and hears a signal between two steps.
        until = time.monotonic() + (.5 if not (control / "hurry").exists() else 0)
        while time.monotonic() < until and not stop:
            time.sleep(.01)
    if stop and epoch < epochs:
        tell("run_stopped"); sys.exit(143)
tell("run_finished")
(folder / "summary.json").write_text(json.dumps({"status": "finished", "test_accuracy": score - 0.01, "test_count": 500, "seconds": 1.0,
    "steps": 10 * epochs, "weights_sha256": hashlib.sha256(f"{name} {lr}".encode()).hexdigest()}))
"""
WORDS = [
    *("--data.path", str(SAMPLE), "--data.image-size", "28", "--model.weights", "none", "--workers", "1", "--run", "s"),
    *("--train.epochs", "4", "--eta", "2", "--trials", "6"),
]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The runs of this module's searches are pretended ones."""
    script = tmp_path_factory.mktemp("search") / "pretended.py"
    script.write_text(PRETENDED)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(running_module, "words_of", lambda *given: [str(script), *words_of(*given)[2:]])
        yield script


@pytest.fixture
def pretended(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder whose files say what the pretended runs do."""
    monkeypatch.setenv("PRETENDED", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def undisturbed(script: Path) -> Path:
    """The folder of a search that nothing has disturbed."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PRETENDED", str(script.parent))
        assert search(script.parent)[0] == 0
    return script.parent / "runs" / "s"


@pytest.fixture
def whole(undisturbed: Path) -> dict[str, Any]:
    """Its result."""
    result: dict[str, Any] = json.loads((undisturbed / "search.json").read_bytes())
    return result


def search(folder: Path, *more: str, name: str = "runs") -> tuple[int, dict[str, Any]]:
    status = main([*WORDS, "--data.root", str(DATA_ROOT), "--storage", str(folder / name), *more])
    file = folder / name / "s" / "search.json"
    return status, json.loads(file.read_bytes()) if file.exists() else {}


def events_of(folder: Path, trial: int, name: str = "runs") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name / "s" / f"trial-{trial:03d}" / "journal.jsonl").read_text().splitlines()]


def test_a_search_stops_the_bad_trials_and_names_the_best(undisturbed: Path, whole: dict[str, Any]) -> None:
    assert whole["rungs"] == [1, 2, 4]
    best = whole["trials"][0]
    assert best["run"] == whole["best"]
    ended = [each for each in whole["trials"] if each["end"] == "finished"]
    assert max(ended, key=lambda each: each["score"]) == best
    assert best["score"] == pytest.approx(0.6 - abs(best["settings"]["optim.lr"] - 0.1)), "it was trained to the end"
    stopped = [each for each in whole["trials"] if each["end"] == "stopped"]
    assert stopped
    assert all(each["weights_sha256"] is None for each in stopped)
    own = next(each for each in whole["trials"] if each["trial"] == 0)
    assert (own["epochs"], own["end"]) == (4, "finished"), "the given settings are trained to the end in any case"
    assert whole["gain"]["own"] == pytest.approx(own["test_accuracy"])
    config = from_toml((undisturbed / "best.toml").read_text())
    assert config.optim.lr == best["settings"]["optim.lr"]
    assert config.data.fold == "", "a run with the best settings learns from all images"
    assert (config.run, config.storage) == ("", RunConfig().storage), "where it lies, its command says"


def test_what_has_finished_is_not_trained_again_and_more_trials_are_added(
    pretended: Path, undisturbed: Path, whole: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(undisturbed, pretended / "whole" / "s")
    files = ("search.json", "best.toml")
    before = [(pretended / "whole" / "s" / name).read_bytes() for name in files]
    starts = [len(events_of(pretended, trial, "whole")) for trial in range(6)]
    assert search(pretended, name="whole")[0] == 0
    assert "trial-000, epoch 1 of 4" in capsys.readouterr().out
    assert [(pretended / "whole" / "s" / name).read_bytes() for name in files] == before
    assert [len(events_of(pretended, trial, "whole")) for trial in range(6)] == starts
    status, more = search(pretended, "--trials", "8", name="whole")
    assert status == 0
    assert len(more["trials"]) == 8
    before_and_now = [{each["trial"]: each["settings"] for each in result["trials"]} for result in (whole, more)]
    assert all(before_and_now[1][trial] == values for trial, values in before_and_now[0].items())


def test_a_trial_whose_driver_is_killed_goes_on(pretended: Path, whole: dict[str, Any]) -> None:
    for file in ("dies-0-2", "dies-1-1", "dies-3-1"):
        (pretended / file).touch()
    assert search(pretended) == (0, whole)
    assert [event["event"] for event in events_of(pretended, 1)].count("run_started") >= 2


def test_trials_at_once_come_to_an_end_too_whatever_the_weather(pretended: Path) -> None:
    status, calm = search(pretended, "--jobs", "3", name="calm")
    assert status == 0
    for file in ("dies-0-1", "dies-2-1", "dies-0-4"):  # other trials are done first now
        (pretended / file).touch()
    (pretended / "hurry").touch()
    assert search(pretended, "--jobs", "3", name="storm") == (0, calm)


def test_a_trial_that_diverges_is_the_worst_and_is_not_tried_again(pretended: Path) -> None:
    (pretended / "diverges-1").touch()
    status, result = search(pretended)
    assert status == 0
    last = result["trials"][-1]
    assert (last["trial"], last["end"], last["score"], last["diverged"]) == (1, "diverged", None, "the loss is nan")
    assert search(pretended)[0] == 0
    assert [event["event"] for event in events_of(pretended, 1)].count("run_started") == 1


def test_a_trial_that_is_refused_ends_the_search_with_its_words(pretended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pretended / "refuses-2").touch()
    assert search(pretended)[0] == 1
    assert "trial-002 ended with status 2; the same command goes on with it. It said:\nsaid by trial-002" in capsys.readouterr().err
    (pretended / "refuses-2").unlink()
    assert search(pretended)[0] == 0


def command(script: Path, folder: Path, name: str) -> "subprocess.Popen[bytes]":
    code = f"""
        import sys
        from trainer.search import running
        from trainer.search.__main__ import main
        words = running.words_of
        running.words_of = lambda *given: [{str(script)!r}, *words(*given)[2:]]
        sys.exit(main({[*WORDS, "--data.root", str(DATA_ROOT), "--storage", str(folder / name)]!r}))
    """
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)],
            cwd=SAMPLE.parents[2],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def held(folder: Path, process: "subprocess.Popen[bytes]") -> None:
    """Wait until a pretended run waits."""
    while not (folder / "held").exists():
        assert process.poll() is None, "the command ended"
        time.sleep(0.02)


def pids_of(folder: Path, name: str) -> Iterator[int]:
    for journal in (folder / name / "s").glob("trial-*/journal.jsonl"):
        yield from (event["pid"] for line in journal.read_text().splitlines() if (event := json.loads(line))["event"] == "run_started")


def test_a_search_killed_twice_ends_in_the_same_bytes(script: Path, pretended: Path, undisturbed: Path, whole: dict[str, Any]) -> None:
    for hold in ("holds-1-1", "holds-5-1"):
        (pretended / hold).touch()
        (pretended / "held").unlink(missing_ok=True)
        process = command(script, pretended, "killed")
        held(pretended, process)
        process.kill()
        process.wait()
        end = time.monotonic() + 60
        while any(Path(f"/proc/{pid}/cmdline").exists() and b"pretended" in Path(f"/proc/{pid}/cmdline").read_bytes()
                  for pid in pids_of(pretended, "killed")):  # fmt: skip
            assert time.monotonic() < end, "a run outlives its search"
            time.sleep(0.02)
        assert not (pretended / "killed" / "s" / "search.json").exists()
        (pretended / hold).unlink()
    assert search(pretended, name="killed") == (0, whole)
    assert (pretended / "killed" / "s" / "search.json").read_bytes() == (undisturbed / "search.json").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_search_and_its_trials_and_the_command_goes_on(
    script: Path, pretended: Path, whole: dict[str, Any], number: int
) -> None:
    (pretended / "holds-1-1").touch()
    process = command(script, pretended, "stopped")
    held(pretended, process)
    os.kill(process.pid, number)
    assert process.wait() == 128 + number
    assert b"stopped; the same command goes on" in (pretended / "stopped.log").read_bytes()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids_of(pretended, "stopped")), "its trials have ended before it did"
    (pretended / "holds-1-1").unlink()
    assert search(pretended, name="stopped") == (0, whole)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--trials", "1"], "--trials 1 must be at least 2"),
        (["--trials", "1000"], "more than 999"),
        (["--eta", "1"], "--eta 1 must be at least 2"),
        (["--jobs", "0"], "--jobs 0 must be at least 1"),
        (["--minutes", "nan"], "--minutes nan must be at least 0"),
        (["--image-epochs", "100"], "less than the two whole runs of 4 epochs"),
        (["--train.max-steps", "7"], "a search stops trials after whole epochs"),
        (["--space", "nope"], "is no space"),
        (["--data.batch-size", "-1"], "data.batch_size"),
    ],
)
def test_what_cannot_be_searched_is_refused(pretended: Path, words: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        search(pretended, *words)
    assert ended.value.code == 2
    assert problem in " ".join(capsys.readouterr().err.split())
    assert not (pretended / "runs" / "s" / "trial-000").exists()


def test_settings_that_do_not_fit_each_other_are_refused_before_any_trial(pretended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = pretended / "space.toml"
    space.write_text("[data.batch_size]\nvalues = [100, 5000]\n[train.virtual_ranks]\nvalues = [1, 64]")
    with pytest.raises(SystemExit):
        search(pretended, "--space", str(space))
    said = " ".join(capsys.readouterr().err.split())
    assert "cannot be trained" in said
    assert "change the space" in said


def test_a_budget_of_image_epochs_begins_fewer_trials(pretended: Path) -> None:
    status, result = search(pretended, "--image-epochs", str(1600 * 10))
    assert status == 0
    assert 1 < len(result["trials"]) < 6
    assert result["cost"]["epochs"] <= 10


def test_minutes_that_are_over_begin_no_new_trial_and_what_they_decided_stays(pretended: Path) -> None:
    status, result = search(pretended, "--minutes", "0.0001")
    assert status == 0
    assert len(result["trials"]) == 1
    assert search(pretended) == (0, result), "the clock decided once"


def test_texts_are_searched_where_encoders_learn_best(pretended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, table = make_model(pretended / "model"), write_csv(pretended / "texts.csv", rows(range(200)))
    words = [
        *(str(table), "--model.name", f"hf/{model}", "--data.max-tokens", "32", "--workers", "1", "--run", "s", "--train.epochs", "4"),
        *("--eta", "2", "--trials", "4", "--data.root", str(pretended / "data"), "--storage", str(pretended / "runs")),
    ]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "settings of the recipe texts" in said
    assert "a fifth of the training texts is held out" in said
    assert "a run with its settings on all texts" in said
    assert "image" not in said.replace("image-epochs", "")
    file = pretended / "runs" / "s" / "search.json"
    before = file.read_bytes()
    result = json.loads(before)
    assert list(result["space"]) == ["optim.lr", "optim.layer_decay", "optim.head_lr_factor", "optim.weight_decay"]
    assert result["cost"]["texts_per_epoch"] == 144, "of 200 a tenth is tested, and a fifth of the others held out"
    best = from_toml((file.parent / "best.toml").read_text())
    assert (best.model.name, best.data.fold) == (f"hf/{model}", "")
    assert best.optim.clip_norm == 1, "the recipe's"
    file.unlink()
    assert main(words) == 0
    assert file.read_bytes() == before
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*words, "--space", "augmentation"])
    assert f"[data.flip] cannot be searched: model.name=hf/{model} takes texts" in " ".join(capsys.readouterr().err.split())


def test_nothing_is_said_of_a_trial_that_saw_nothing() -> None:
    assert Seen().score(BEST, 1, 4) == (None, False)

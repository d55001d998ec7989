"""What the command line gives is what it gave when expected.json was recorded: names, settings, files, keys, columns, and bits.

Where this machine rounds otherwise than all that were recorded, the tests of bits skip; all others hold everywhere.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.golden.commands import KILLED, NAMED, RESUMED, RUNS, SETTINGS, STOPPED_RUNS, Goldens, has_bf16, print_config
from tests.golden.probe import probe
from tests.golden.record import load
from tests.golden.results import (
    bits,
    checkpoint,
    differences,
    events,
    facts,
    losses,
    newest_checkpoint,
    order,
    predictions_sha256,
    shape,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

EXPECTED = load()
EVERYWHERE = EXPECTED["everywhere"]
SHOWN = 20  # of the differences


@pytest.fixture(scope="module")
def goldens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Goldens]:
    goldens = Goldens(tmp_path_factory.mktemp("golden"))
    yield goldens
    goldens.close()


@pytest.fixture(scope="module")
def rounded() -> dict[str, Any]:
    """What was recorded on a machine that rounds as this one does."""
    here, known = probe(), EXPECTED["by_rounding"]
    if here not in known:
        pytest.skip(
            f"another CPU's rounding: the probe gives {here}, recorded are {', '.join(known)}; record with python -m tests.golden.record"
        )
    runs: dict[str, Any] = known[here]["runs"]
    return runs


def assert_same(found: Any, pinned: Any) -> None:
    lines = differences(found, pinned)
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    assert not lines, "\n".join([*lines[:SHOWN], *more])


def skip_without_bf16(name: str) -> None:
    if RUNS[name].needs_bf16 and not has_bf16():
        pytest.skip("this CPU only emulates bf16")


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_keep_their_names_and_defaults(name: str) -> None:
    assert_same(print_config(SETTINGS[name]), EVERYWHERE["settings"][name])


@pytest.mark.parametrize("name", NAMED)
def test_a_command_keeps_the_name_that_it_gives_its_run(name: str, goldens: Goldens) -> None:
    assert goldens.name_of(NAMED[name]) == EVERYWHERE["names"][name]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_leaves_the_same_files_keys_and_columns(name: str, goldens: Goldens) -> None:
    skip_without_bf16(name)
    found, pinned = facts(goldens.finished(name)), EVERYWHERE["runs"][name]
    assert_same(found, pinned)
    assert found["predictions"].keys() == pinned["predictions"].keys()


@pytest.mark.parametrize("name", RUNS)
def test_a_run_ends_in_the_same_bits_as_when_it_was_recorded(name: str, goldens: Goldens, rounded: dict[str, Any]) -> None:
    skip_without_bf16(name)
    assert_same(bits(goldens.finished(name)), rounded[RUNS[name].bits_of])


def test_two_workers_end_in_the_bits_of_one(goldens: Goldens) -> None:
    one, two = goldens.finished("quickstart, 1 worker"), goldens.finished("quickstart, 2 workers")
    assert one.name == two.name
    assert order(one) == order(two)
    assert losses(one) == losses(two)
    assert bits(one)["weights_sha256"] == bits(two)["weights_sha256"]


@pytest.mark.parametrize("name", KILLED)
def test_two_workers_one_of_them_killed_end_in_the_bits_of_one(name: str, goldens: Goldens) -> None:
    one, killed = goldens.finished(KILLED[name].same_as), goldens.finished(name)
    failed = [event for event in events(killed) if event["event"] == "attempt_failed"]
    assert [event["kind"] for event in failed] == ["infrastructure"]
    assert order(one) == order(killed)
    assert losses(one) == losses(killed)
    assert bits(one)["weights_sha256"] == bits(killed)["weights_sha256"]


def test_a_killed_run_answers_as_an_undisturbed_one_and_leaves_the_same_keys(goldens: Goldens) -> None:
    whole, killed = goldens.finished("quickstart, 2 workers"), goldens.finished("quickstart, killed")
    assert killed.name == whole.name
    assert predictions_sha256(killed) == predictions_sha256(whole)
    found, undisturbed = facts(killed), facts(whole)
    assert (found["counted"].pop("restarts"), undisturbed["counted"].pop("restarts")) == (1, 0)
    for differs in ("files", "events"):  # those of a second attempt
        assert set(undisturbed.pop(differs)) <= set(found.pop(differs))
    del found["counted"]["checkpoints"], undisturbed["counted"]["checkpoints"]  # some may be made twice
    assert_same(found, undisturbed)


def test_a_run_that_86cc2bf_stopped_goes_on_from_its_step_and_sees_each_sample_once(goldens: Goldens) -> None:
    (stopped,) = STOPPED_RUNS.iterdir()
    resumed = goldens.finished(RESUMED)
    assert resumed.name == stopped.name  # the same command means the same run
    saved = int(newest_checkpoint(stopped).name[5:13])
    assert saved % 40 > 0, "the saved step is to be in the middle of an epoch"
    (went_on,) = (event for event in events(resumed) if event["event"] == "resumed")
    assert went_on["step"] == saved
    starts = [event["start_step"] for event in events(resumed) if event["event"] == "attempt_started"]
    assert starts == [0, saved]
    assert len(losses(resumed)) == 60
    assert losses(resumed)[:saved] == losses(stopped)
    steps = sorted((step, virtual_rank) for _, step, virtual_rank, _ in order(resumed))
    assert steps == [(step, virtual_rank) for step in range(60) for virtual_rank in range(2)]
    first_epoch = [sample for epoch, _, _, ids in order(resumed) for sample in ids if epoch == 0]
    assert sorted(first_epoch) == list(range(2000))


def test_a_checkpoint_has_the_files_keys_and_tensors_that_86cc2bf_saved(goldens: Goldens) -> None:
    (stopped,) = STOPPED_RUNS.iterdir()
    now, then = checkpoint(newest_checkpoint(goldens.finished(RESUMED))), checkpoint(newest_checkpoint(stopped))
    assert shape(now.pop("history.json").pop("evaluations")) != []  # there was none yet
    assert then.pop("history.json")
    assert_same(now, then)


def test_a_run_that_86cc2bf_stopped_ends_in_the_bits_of_one_that_was_not(goldens: Goldens, rounded: dict[str, Any]) -> None:
    assert_same(bits(goldens.finished(RESUMED)), rounded[RESUMED])

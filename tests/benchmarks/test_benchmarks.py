"""What the benchmarks' figures rest on: turns, spread, paired intervals, targets, items of a start, the table of results. No speed."""

import contextlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import (
    article,
    common,
    compression,
    end_to_end,
    gpu_suite,
    kernels,
    loader,
    overhead,
    quickstart,
    readme,
    remainder,
    startup,
    text_quickstart,
    time_to_accuracy,
    unlabelled,
)
from benchmarks.common import Taken, finite, interleave, median_interval, paired, spread, target, verdict

numbers = st.floats(-1e6, 1e6)
SMALL = ("--model.name", "shufflenet_v2_x0_5", "--model.stem", "native", "--train.precision", "fp32")
OWN = (
    *("loader", "end_to_end", "overhead", "time_to_accuracy", "stems", "startup", "gpu_suite", "bare", "article", "readme", "compression"),
    *("small_maps", "remainder", "learning", "augmentation", "peers", "audit", "unlabelled", "exported", "serving", "inference"),
    *("quickstart", "text_quickstart"),
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=common.PROJECT, capture_output=True, text=True, check=False, timeout=240)


def test_every_command_explains_itself():
    # One process, as each import of torch costs seconds.
    code = "import runpy, sys\n" + "".join(
        f"sys.argv = ['x', '--help']\ntry:\n    runpy.run_module('benchmarks.{name}', run_name='__main__')\n"
        f"except SystemExit as end:\n    assert end.code == 0, '{name}'\n"
        for name in OWN
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in OWN:
        assert f"python -m benchmarks.{name}" in done.stdout or f"{name}.py" in done.stdout or name == "article"


@given(st.lists(st.text(min_size=1), min_size=1, max_size=6, unique=True), st.integers(0, 12))
def test_each_case_has_its_turn_once_a_round_and_each_comes_first_as_often(names, rounds):
    turns = list(interleave(names, rounds))
    for number in range(rounds):
        assert sorted(name for each, name in turns if each == number) == sorted(names)
    firsts = [turns[number * len(names)][1] for number in range(rounds)]
    counts = [firsts.count(name) for name in names]
    assert max(counts) - min(counts) <= 1
    assert [number for number, _ in turns] == sorted(number for number, _ in turns)


@given(st.lists(numbers, min_size=1, max_size=40))
def test_spread_lies_within_what_was_measured(values):
    found = spread(values)
    low, high = found["quartiles"]
    assert found["least"] <= low + 1e-9 <= found["median"] + 2e-9 <= high + 3e-9 <= found["most"] + 4e-9
    assert (found["least"], found["most"], found["rounds"]) == (min(values), max(values), len(values))


def test_nothing_measured_is_no_figure():
    with pytest.raises(ValueError, match="no round"):
        spread([])
    with pytest.raises(ValueError, match="no pair"):
        median_interval([])


@pytest.mark.parametrize(
    ("pairs", "rank", "confidence"),
    # The tables of Dixon and Massey for the median's confidence interval: the rank-th smallest and largest value.
    [(6, 1, 0.9688), (8, 1, 0.9922), (9, 2, 0.9609), (10, 2, 0.9785), (15, 4, 0.9648), (20, 6, 0.9586), (25, 8, 0.9567), (30, 10, 0.9572)],
)
def test_interval_of_the_median_is_the_tables(pairs, rank, confidence):
    values = list(range(1, pairs + 1))
    random.Random(0).shuffle(values)
    found = median_interval(values)
    assert (found["low"], found["high"]) == (rank, pairs + 1 - rank)
    assert found["confidence"] == pytest.approx(confidence, abs=5e-5)


def test_too_few_pairs_say_what_their_range_is_worth():
    found = median_interval([3.0, 1.0, 2.0])
    assert (found["low"], found["high"], found["confidence"]) == (1.0, 3.0, 0.75)
    assert median_interval([5.0])["confidence"] == 0.0


def test_interval_covers_the_median_as_often_as_it_says():
    draws = np.random.default_rng(0).lognormal(size=(2000, 21))  # skewed: a mean and its error would do worse
    hits = sum(found["low"] <= 1.0 <= found["high"] for found in map(median_interval, draws.tolist()))
    assert 0.95 - 0.01 <= hits / len(draws) <= median_interval(list(range(21)))["confidence"] + 0.01


@given(st.lists(st.tuples(numbers, st.floats(-10, 10)), min_size=1, max_size=40))
def test_what_disturbs_a_whole_round_falls_out_of_paired_differences(rounds):
    theirs = [disturbance for disturbance, _ in rounds]
    ours = [disturbance + price for disturbance, price in rounds]
    found, direct = paired(ours, theirs), median_interval([price for _, price in rounds])
    for end in ("median", "low", "high"):
        assert found[end] == pytest.approx(direct[end], abs=1e-6)


def test_pairs_belong_together():
    with pytest.raises(ValueError, match="shorter"):
        paired([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("measured", "sides", "met"),
    [
        (2.0, {"at_least": 2.0}, True),
        (1.99, {"at_least": 2.0}, False),
        (0.01, {"at_most": 0.01}, True),
        (0.011, {"at_most": 0.01}, False),
        (None, {"at_most": 0.01}, None),
        (math.nan, {"at_least": 2.0}, None),
        (0.005, {"at_most": 0.01, "interval": (0.001, 0.009)}, True),
        (0.005, {"at_most": 0.01, "interval": (-0.02, 0.03)}, None),
        (0.02, {"at_most": 0.01, "interval": (0.011, 0.03)}, False),
        (2.5, {"at_least": 2.0, "interval": (1.9, 2.6)}, None),
    ],
)
def test_targets_are_judged_by_their_side_and_left_open_by_noise(measured, sides, met):
    row = target("claim", measured, **sides)
    assert row["met"] is met
    assert row["goal"] == next(value for side, value in sides.items() if side != "interval")
    word = verdict(row).split("  ")[0].strip()
    assert word == {True: "met", False: "MISSED", None: "undecided" if measured is not None else "not measured"}[met]


def test_what_a_result_says_is_json_even_where_nothing_was_measured():
    taken = Taken(wall_seconds=math.nan, cpu_seconds=math.inf)
    assert json.loads(json.dumps(finite({"a": [taken, 1], "b": (math.nan,)}), allow_nan=False)) == {
        "a": [{"wall_seconds": None, "cpu_seconds": None}, 1],
        "b": [None],
    }


def test_command_in_a_result_leaves_out_where_it_was_written_and_the_paths_of_the_machine():
    given = ["--rounds", "3", "--out", "x.json", "--hardware=here", "--json", "--hardware", "there", "--keep", "/tmp/kept"]
    assert common.told_words(given) == ["--rounds", "3", "--json"]
    given = ["--script", "/somewhere/train.py", "--folder=/somewhere/else/pictures", "--cases", "one, two", "--", "here/below"]
    assert common.told_words(given) == ["--script", "train.py", "--folder=pictures", "--cases", "one, two", "--", "here/below"]


def test_no_result_names_a_path_of_the_machine_on_which_it_was_measured():
    results = sorted((common.PROJECT / "benchmarks" / "results").glob("*.json"))
    assert results
    paths = re.compile(r"(?<![\w.:/])/(?:tmp|home|root|work|mnt|opt|Users)/")
    assert [path.name for path in results if paths.search(path.read_text())] == []


def test_a_process_is_timed_line_by_line_and_its_cpu_time_counted():
    code = "import time\nprint('a')\nt = time.process_time()\nwhile time.process_time() - t < 0.3: pass\nprint('b')"
    done = common.run_process(["-c", code], timeout_seconds=60).checked()
    assert [line for _, line in done.lines] == ["a", "b"]
    assert done.lines[1][0] - done.lines[0][0] > 0.25  # printed when it happened, not at the end
    assert done.cpu_seconds >= 0.3


def test_a_process_that_fails_or_hangs_says_what_it_printed():
    with pytest.raises(RuntimeError, match=r"(?s)ended with 3.*no room"):
        common.run_process(["-c", "print('no room'); raise SystemExit(3)"], timeout_seconds=60).checked()
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)did not end within 2 s.*waiting"):
        common.run_process(["-c", "import time; print('waiting'); time.sleep(100)"], timeout_seconds=2)
    assert time.monotonic() - began < 60


# -- loader


def test_cpu_time_of_the_tutorials_worker_processes_is_counted():
    images = np.zeros((400, 32, 32, 3), np.uint8)
    dataset = loader.Tutorial(images, np.zeros(400, np.int64))
    children = loader.cpu_of_children()
    assert loader.consume(loader.tutorial_batches(dataset, 100, 6, workers=2)) == 600  # into a second epoch, as many images as asked for
    assert loader.cpu_of_children() > children


def test_one_dali_kernel_makes_the_reference_images():
    from dataio.codecs.image.augment import draw, reference

    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    ids = np.arange(39, -1, -2)
    drawn = draw(seed=1, epoch=0, ids=ids, pad=loader.PAD, flip=True)
    found = loader.OneKernel(images, loader.PAD, len(ids)).batch(ids, drawn).numpy()
    expected = (reference(images[ids], drawn, loader.PAD).astype(np.float32) - np.float32(127.5)) / np.float32(127.5)
    np.testing.assert_allclose(found, expected.transpose(0, 3, 1, 2), atol=3e-7)


# -- overhead


def blocks(prices: dict[str, float], *, count: int = 12) -> list[tuple[str, dict[str, Taken]]]:
    """Rounds of a machine that is slow in some of them; a block of the run costs `prices[kind]` seconds more than a bare one."""
    noise = random.Random(0)
    made = []
    for number in range(4 * count):
        kind = (overhead.PLAIN, overhead.CHECK, overhead.PLAIN, overhead.CHECKPOINT)[number % 4]
        bare = 1.0 + noise.random()
        price = prices[overhead.PLAIN] + (prices[kind] if kind != overhead.PLAIN else 0.0)
        taken = {"bare": bare, "stepper": bare, "stock": bare + 0.003, "run": bare + price}
        made.append((kind, {arm: Taken(wall_seconds=seconds, cpu_seconds=2 * seconds) for arm, seconds in taken.items()}))
    return made


def test_overhead_divides_what_is_rare_by_the_steps_between(tmp_path):
    config = overhead.settings_of(str(common.SAMPLE), tmp_path, 100, [])
    made = blocks({overhead.PLAIN: 0.004, overhead.CHECK: 0.3, overhead.CHECKPOINT: 5.0})
    found = overhead.judged(made, config, Taken(wall_seconds=0.5, cpu_seconds=1.0), 100)
    # a block is two steps: 2 ms a step, a check once in 100 steps, a checkpoint once in 500
    expected = 0.002 + 0.3 / 100 + 5.0 / 500
    assert found["steps_between"] == {overhead.CHECK: 100, overhead.CHECKPOINT: 500}
    assert found["wall_seconds"]["a_step"]["median"] == pytest.approx(expected, rel=1e-6)
    assert found["wall_seconds"]["share"]["median"] == pytest.approx(expected / 0.5, rel=1e-6)
    assert found["cpu_seconds"]["share"]["median"] == pytest.approx(2 * expected / 1.0, rel=1e-6)
    assert found["wall_seconds"]["share_over_pytorchs_optimizer"]["median"] == pytest.approx((expected - 0.0015) / 0.5, rel=1e-6)


def test_overhead_of_a_step_does_not_depend_on_how_many_make_a_block(tmp_path):
    """The rare costs come once a block, whatever its length; what each step costs is divided by the steps of a block."""
    config = overhead.settings_of(str(common.SAMPLE), tmp_path, 100, [], steps_a_block=20)
    assert (config.train.checkpoint_every, config.train.verify_every) == (80, 40)
    full = Taken(wall_seconds=0.5, cpu_seconds=1.0)
    short = overhead.judged(blocks({overhead.PLAIN: 0.004, overhead.CHECK: 0.3, overhead.CHECKPOINT: 5.0}), config, full, 100)
    made = blocks({overhead.PLAIN: 0.04, overhead.CHECK: 0.3, overhead.CHECKPOINT: 5.0})
    long = overhead.judged(made, config, full, 100, steps_a_block=20)
    assert long["steps_a_block"] == 20
    for end in ("median", "low", "high"):
        assert long["wall_seconds"]["a_step"][end] == pytest.approx(short["wall_seconds"]["a_step"][end], rel=1e-6)


def test_run_and_bare_loop_take_turns_on_the_same_steps(tmp_path):
    """The whole measurement, small: a real run's steps, with checkpoints and checks where the settings want them, between bare ones."""
    config = overhead.settings_of(str(common.SAMPLE), tmp_path, 10, SMALL)
    rounds = 9
    found = overhead.in_one_process(config, tmp_path, rounds=rounds, full_batch=10, threads=1)
    assert sum(found["blocks"].values()) in (rounds - 1, rounds)  # the last one may hold the run's evaluation
    assert all(found["blocks"].values()), found["blocks"]
    assert (tmp_path / "overhead" / "ledger").is_dir()
    assert list((tmp_path / "overhead" / "checkpoints").iterdir())


def test_the_bare_loop_does_the_runs_step(tmp_path):
    """Else what is compared is not the price of watching it."""
    from benchmarks.bare import Bare, loader_of
    from dataio.parquet import open_dataset

    config = overhead.settings_of(str(common.SAMPLE), tmp_path, 10, SMALL)
    dataset, cpu = open_dataset(common.SAMPLE), torch.device("cpu")
    loader = loader_of(config, dataset, cpu)
    bare = Bare(config, dataset, loader.image_size, cpu)
    stock = Bare(config, dataset, loader.image_size, cpu, pytorchs_optimizer=True)
    ours = overhead.stepper_alone(config, dataset, loader.image_size, cpu)
    with contextlib.closing(loader.train(0, 3)) as batches:
        for step, (batch,) in enumerate(batches):
            loss = float(bare.step(batch, step))
            assert loss == float(stock.step(batch, step))
            assert loss == pytest.approx(float(ours(batch, step)), rel=1e-4)


@pytest.mark.ray
def test_the_bare_loop_does_the_same_steps_alone_under_torchrun_and_in_plain_ray_train():
    own = ["-m", "benchmarks.bare", "--data", str(common.SAMPLE), "--steps", "3", "--threads", "1"]
    rest = ["--", "--data.batch-size", "10", *SMALL, "--model.weights", "none"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    found = []
    for command, processes in (([*own, *rest], 0), ([*torchrun, *own, *rest], 1), ([*own, "--ray", *rest], 1)):
        done = run(*command)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(overhead.json_in(done.stdout))
        assert (found[-1]["processes"], found[-1]["images"], len(found[-1]["times"])) == (processes, 30, 3)
    assert len({each["loss"] for each in found}) == 1


def test_the_bare_loop_refuses_what_it_does_not_do(tmp_path):
    from benchmarks.bare import Bare
    from dataio.parquet import open_dataset

    config = overhead.settings_of(str(common.SAMPLE), tmp_path, 10, [*SMALL, "--train.ema", "0.9"])
    with pytest.raises(ValueError, match=r"train\.ema=0\.9"):
        Bare(config, open_dataset(common.SAMPLE), (28, 28), torch.device("cpu"))


def test_steady_speed_leaves_out_the_first_steps():
    times = [0.0, 50.0, 51.0, 52.0, 53.0, 54.0, 54.5, 55.0, 56.5]
    assert overhead.steady(times, 100, warm_steps=6) == {"images_per_second": 100 * 3 / 2.5, "median_step_seconds": 0.5}
    with pytest.raises(ValueError, match="too few"):
        overhead.steady(times[:7], 100, warm_steps=5)


def test_result_of_a_process_is_found_among_its_warnings():
    assert overhead.json_in('{"a": 1}\nwarning\n{"a": 2}\nbye') == {"a": 2}
    with pytest.raises(RuntimeError, match="no result"):
        overhead.json_in("Traceback")


# -- compression


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=9))
def test_a_loss_of_accuracy_is_counted_seed_by_seed_and_in_points(accuracies):
    def rows(which: int) -> list[dict[str, object]]:
        made = [pair[which] for pair in accuracies]
        return [{"seed": n, "test_accuracy": x, "test_loss": 1 - x, "weights_sha256": f"{which}-{n}"} for n, x in enumerate(made)]

    found = compression.judged({"fp32": rows(0), "bf16": rows(1)})
    lost = sorted(100 * (exact - rounded) for exact, rounded in accuracies)
    assert lost[0] <= found["points_lost"]["low"] <= found["points_lost"]["median"] <= found["points_lost"]["high"] <= lost[-1]
    if lost[0] > compression.GOAL_POINTS:
        assert found["targets"][0]["met"] is False
    if lost[-1] < compression.GOAL_POINTS:
        assert found["targets"][0]["met"] is True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_an_ended_benchmark_leaves_no_process_behind(tmp_path: Path, number: signal.Signals) -> None:
    at = tmp_path / "pid"
    measured = f"import os, pathlib, time; pathlib.Path({str(at)!r}).write_text(str(os.getpid())); time.sleep(600)"
    program = (
        "import argparse; from benchmarks.common import described, run_process; described('x', argparse.Namespace(hardware='here'));"
        f"run_process(['-c', {measured!r}], timeout_seconds=600)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "FINETUNE_INSIDE_BENCHMARK"}
    benchmark = subprocess.Popen([sys.executable, "-c", program], cwd=common.PROJECT, env=environment, stderr=subprocess.PIPE)
    while not at.exists() or not at.read_text():
        assert benchmark.poll() is None
        time.sleep(0.02)
    benchmark.send_signal(number)
    benchmark.communicate(timeout=60)
    assert benchmark.returncode
    with pytest.raises(ProcessLookupError):
        os.kill(int(at.read_text()), 0)


def test_a_row_is_measured_once_over_commands_and_what_an_end_tore_is_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    asked: list[int] = []

    def measured(number: int) -> dict[str, int]:
        asked.append(number)
        return {"number": number}

    for numbers in ([1, 2], [2, 1, 3]):
        kept = common.Kept(file)
        assert [kept.known_or({"b": number, "a": 0}, lambda number=number: measured(number)) for number in numbers] == [
            {"number": number} for number in numbers
        ]
    assert asked == [1, 2, 3]
    with file.open("a") as torn:
        torn.write('{"key": {"a": 0, "b": 4}, "ro')
    kept = common.Kept(file)
    kept.known_or({"a": 0, "b": 4}, lambda: measured(4))
    assert common.Kept(file).known_or({"a": 0, "b": 4}, lambda: measured(5)) == {"number": 4}
    assert asked == [1, 2, 3, 4]
    assert common.Kept(None).known_or("a", lambda: measured(6)) == {"number": 6}


def test_an_encoder_is_judged_against_random_weights_and_against_words_alone():
    def judged(pretrained, random):
        runs = {"pretrained": pretrained, "random": random}
        found = quickstart.joined({name: [{"test_accuracy": one, "test_count": 9} for one in each] for name, each in runs.items()})
        return text_quickstart.targets_of({**found, "tfidf": {"test_accuracy": 0.766}})

    random_weights, words = judged([0.84], [0.70])
    assert (random_weights["met"], words["met"], words["measured"]) == (False, True, pytest.approx(7.4))
    random_weights, words = judged([0.83, 0.84, 0.85], [0.66, 0.67, 0.68])
    assert (random_weights["met"], random_weights["measured"], words["met"]) == (True, pytest.approx(17), True)
    assert judged([0.80, 0.84, 0.88], [0.68, 0.67, 0.66])[0]["met"] is None, "the margin is within the noise"


def test_images_without_labels_are_judged_seed_by_seed_against_the_control_of_as_many_labels():
    def rows(*accuracies, **more):
        return [{"seed": seed, "accuracy": value, **more} for seed, value in enumerate(accuracies)]

    few = {"4/control": rows(0.5, 0.7, 0.6), "4/softmatch": rows(0.6, 0.8, 0.7, unlabelled_right=0.75, unlabelled_weight=0.5)}
    (case, other) = unlabelled.judged({**few, "25/control": rows(0.9, 0.8, 0.7), "25/softmatch": rows(0.8, 0.9, 0.7)})
    assert (case["task"], case["feature"], case["verdict"], case["guesses_right"]) == ("4 labels a class", "softmatch", "pays", 0.75)
    assert case["points"]["mean"] == pytest.approx(10)
    assert (other["labels"], other["verdict"]) == (25, "undecided")
    assert len(unlabelled.lines_of({"cases": [case, other]})) == 3


def test_the_control_and_the_others_share_no_image():
    random = np.random.default_rng(0)
    images = np.arange(200, dtype=np.uint8)[:, None, None].repeat(2, 1)
    arrays = {"train": (images, (np.arange(200) % 10).astype(np.uint8)), "t10k": (images[:50], random.integers(0, 10, 50, dtype=np.uint8))}
    sizes = unlabelled.Sizes(steps=1, unlabelled=100, test=20, side=32, batch=20)
    few, others = unlabelled.divided(arrays, 3, 4, sizes)
    assert np.bincount(few["train"][1]).tolist() == [4] * 10
    assert len(few["t10k"][0]) == 20
    assert len(others["train"][0]) == 100
    assert not set(few["train"][0][:, 0, 0].tolist()) & set(others["train"][0][:, 0, 0].tolist())


def test_a_run_is_ruined_against_the_same_images_without_the_remainder():
    losses = {"65/1/last": (2.0, 300.0), "65/1/spread": (2.1, 3.9), "65/1/left out": (2.0, 2.0), "64/1/last": (2.0, 9.0)}
    rows = {name: [{"seed": seed, "test_loss": loss, "accuracy": 0.5} for seed, loss in enumerate(each)] for name, each in losses.items()}
    cases = {(case["images"], case["rule"]): case for case in remainder.judged(rows)}
    assert {name: case["ruined"] for name, case in cases.items()} == {
        (65, "last"): 1,
        (65, "spread"): 0,
        (65, "left out"): 0,
        (64, "last"): 0,  # whole batches have no peer but themselves
    }
    assert len(remainder.lines_of({"cases": list(cases.values())})) == 5


def test_runs_that_rounded_nothing_are_no_result():
    row = {"seed": 7, "test_accuracy": 0.5, "test_loss": 1.0, "weights_sha256": "a"}
    with pytest.raises(ValueError, match="seed 7: both runs end in the same weights"):
        compression.judged({"fp32": [row], "bf16": [row]})


# -- end to end, start-up, time to accuracy


def test_ratio_is_to_the_faster_of_the_tutorials_two():
    def rows(*rates: float) -> list[dict[str, float]]:
        return [{"images_per_second": rate, "process_seconds": 1.0} for rate in rates]

    found = end_to_end.judged(
        {end_to_end.OURS: rows(300, 330), end_to_end.TUTORIAL[0]: rows(100, 110), end_to_end.TUTORIAL[1]: rows(150, 165)}
    )
    assert found["peer"] == end_to_end.TUTORIAL[1]
    (row,) = found["targets"]
    assert (row["measured"], row["met"]) == (2.0, True)


def test_items_of_a_start_add_up_to_the_time_of_the_first_step():
    done = common.Process(
        command="",
        returncode=0,
        wall_seconds=30.0,
        cpu_seconds=1.0,
        lines=((2.0, "starting a local Ray"), (5.5, "run x in y"), (29.0, "run z")),
    )
    journal = [
        {"time": 105.0, "event": "run_started"},
        {"time": 106.0, "event": "attempt_started"},
        {"time": 107.0, "event": "something_new"},
        {"time": 109.0, "event": "first_step"},
        {"time": 120.0, "event": "run_finished"},
    ]
    items = startup.items_of_run(done, 100.0, journal)
    assert sum(items.values()) == pytest.approx(9.0)
    assert items["ray.init, preflight"] == pytest.approx(3.5)
    assert items["something_new"] == pytest.approx(1.0)
    assert items["first step"] == pytest.approx(2.0)
    with pytest.raises(ValueError, match="never came"):
        startup.items_of_run(done, 100.0, journal[:3])


def test_the_peers_script_compiles():
    compile(startup.SCRIPT, "peer.py", "exec")


def test_time_to_accuracy_ends_with_the_first_evaluation_as_good():
    events = [
        {"event": "run_started", "time": 12.0, "process_started": 10.0},
        {"event": "training_started", "time": 20.0},
        {"event": "evaluation", "time": 30.0, "epoch": 1.0, "test_accuracy": 0.8},
        {"event": "evaluation", "time": 40.0, "epoch": 2.0, "test_accuracy": 0.9},
        {"event": "evaluation", "time": 50.0, "epoch": 3.0, "test_accuracy": 0.95},
    ]
    found = time_to_accuracy.reached(events, 0.9)
    assert found == {"training_seconds": 20.0, "process_seconds": 30.0, "epochs": 2.0, "test_accuracy": 0.9}
    assert time_to_accuracy.reached(events, 0.99) is None


def test_a_seed_that_never_got_there_fails_the_claim():
    trials = [{"share_of_time": 0.05}, {"share_of_time": None}]
    assert time_to_accuracy.judged(trials[:1], 10)["targets"][0]["met"] is True
    assert time_to_accuracy.judged(trials, 10)["targets"][0]["met"] is False


# -- the GPU suite and the table


def test_without_a_gpu_every_claim_is_listed_and_none_is_tried(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_suite, "gpu_name", lambda: "")
    monkeypatch.setattr(gpu_suite, "run_claim", lambda *arguments: pytest.fail("nothing may run"))
    monkeypatch.setattr(sys, "argv", ["gpu_suite", "--out", str(tmp_path / "suite.json")])
    assert gpu_suite.main() == 0
    result = json.loads((tmp_path / "suite.json").read_text())
    assert {name: row["needs"] for name, row in result["claims"].items()} == dict.fromkeys(gpu_suite.CLAIMS, "a GPU")
    printed = capsys.readouterr().out
    for claim in gpu_suite.CLAIMS.values():
        for promise in claim.promises:
            assert promise in printed


def test_a_claim_that_fails_is_a_result_and_costs_no_other(monkeypatch):
    def fails(*arguments: object, **options: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(gpu_suite, "run_process", fails)
    row = gpu_suite.run_claim("sustained", [], 1.0, {})
    assert "illegal memory access" in row["failed"]
    assert row["targets"] == []


def test_all_claims_about_a_gpu_fit_nine_minutes_and_each_call_fits_ten():
    assert sum(claim.budget_seconds for claim in gpu_suite.CLAIMS.values()) <= gpu_suite.SUITE_SECONDS == 540
    assert next(iter(gpu_suite.CLAIMS)) == "sustained", "it compiles for the others"
    parts = [claim.part for claim in gpu_suite.CLAIMS.values()]
    assert parts == sorted(parts)
    assert set(parts) == {1, 2}


def test_what_is_prepared_at_home_is_found_wherever_it_was_moved(tmp_path, capsys, monkeypatch):
    from dataio.parquet import open_dataset

    made = gpu_suite.prepare_data(tmp_path / "home", str(common.SAMPLE), images=20, test=10)
    assert not made.is_whole
    (tmp_path / "home").rename(tmp_path / "there")
    found = gpu_suite.prepared_in(tmp_path / "there")
    dataset = open_dataset(found.data)
    assert (dataset.split("train").count, dataset.split("test").count, found.images) == (20, 10, 20)
    archive = gpu_suite.archive_of(found, tmp_path)
    assert article.read_batches(archive).keys() >= {"data_batch_1", "data_batch_5", "test_batch"}
    written = archive.stat().st_mtime_ns
    assert gpu_suite.archive_of(found, tmp_path).stat().st_mtime_ns == written, "it is made once"
    monkeypatch.setattr(sys, "argv", ["gpu_suite", "--data", str(tmp_path / "home")])
    with pytest.raises(SystemExit):
        gpu_suite.main()
    assert f"--prepare {tmp_path / 'home'}" in capsys.readouterr().err


def test_all_commands_of_a_suite_share_one_folder_of_compiled_kernels(tmp_path, monkeypatch):
    data = gpu_suite.prepare_data(tmp_path / "data", str(common.SAMPLE), images=20, test=10).data.parents[1]
    seen = []

    def notes(name: str, arguments: object, budget_seconds: float, environment: dict[str, str]) -> dict[str, object]:
        seen.append((name, budget_seconds, environment))
        return {"targets": [], "seconds": 0.0}

    monkeypatch.setattr(gpu_suite, "gpu_name", lambda: "a GPU")
    monkeypatch.setattr(gpu_suite, "run_claim", notes)
    for part in ("1", "2"):
        monkeypatch.setattr(sys, "argv", ["gpu_suite", "--data", str(data), "--part", part, "--out", str(tmp_path / f"{part}.json")])
        assert gpu_suite.main() == 0
    whole = {"time_to_accuracy"}  # the sample's images do not do for it
    assert [name for name, _, _ in seen] == [name for name in gpu_suite.CLAIMS if name not in whole]
    assert "full Fashion-MNIST" in json.loads((tmp_path / "2.json").read_text())["claims"]["time_to_accuracy"]["needs"]
    for name, budget, environment in seen:
        assert budget == gpu_suite.CLAIMS[name].budget_seconds
        assert environment == {"TORCHINDUCTOR_CACHE_DIR": f"{data}-kept/inductor", "TRITON_CACHE_DIR": f"{data}-kept/triton"}


def test_the_device_waits_for_what_is_handed_late_and_for_nothing_else():
    now = [0.0]

    def slow():
        for number in range(3):
            now[0] += 7.0 * (number == 1)
            yield number

    handed = gpu_suite.Handed(slow(), torch.device("cpu"), clock=lambda: now[0])
    assert next(handed) == 0
    now[0] += 100.0  # a step's own time
    assert next(handed) == 1
    assert handed.take_seconds() == 7.0
    assert next(handed) == 2
    assert handed.take_seconds() == 0.0


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20), st.sampled_from("ab")), min_size=1, max_size=30), st.integers(1, 4))
def test_a_table_of_kernels_loses_no_time_and_counts_what_overlaps_once(spans, rows):
    seen = [kernels.Kernel(name=name, begin_seconds=float(begin), end_seconds=float(begin + length)) for begin, length, name in spans]
    covered = {second for begin, length, _ in spans for second in range(begin, begin + length)}
    assert kernels.busy_seconds(seen) == len(covered)
    found = kernels.table(seen, 2, rows=rows)
    whole = sum(length for _, length, _ in spans)
    for part in ("kernels", "by_kind"):
        assert sum(row["microseconds_a_step"] for row in found[part]) == pytest.approx(1e6 * whole / 2)
        assert sum(row["launches_a_step"] for row in found[part]) == found["launches_a_step"] == len(spans) / 2
    assert len(found["kernels"]) <= rows + 1


def test_kernels_are_told_apart_by_their_names():
    names = {
        "sm90_xmma_fprop_implicit_gemm_bf16f32": "convolutions",
        "triton_red_fused_native_batch_norm_3": "compiled",
        "void at::native::multi_tensor_apply_kernel": "optimiser",
        "Memcpy DtoD (Device -> Device)": "copies",
        "nvjet_hsh_128x64": "matrix products",
        "elementwise": "others",
    }
    assert {name: kernels.kind_of(name) for name in names} == names
    with pytest.raises(ValueError, match="no kernel"):
        kernels.table([], 20)


def test_every_claim_is_in_the_page_of_claims():
    page = (common.PROJECT / "benchmarks" / "GPU.md").read_text()
    for name, claim in gpu_suite.CLAIMS.items():
        assert f"--only {name}`" in page, name
        assert re.search(rf"^\| `{name}` \| {claim.part} \| {claim.budget_seconds:.0f} s \|", page, re.MULTILINE), name


def test_every_module_is_in_the_readme():
    page = (common.PROJECT / "benchmarks" / "README.md").read_text()
    for name in ("loader", "end_to_end", "overhead", "startup", "time_to_accuracy", "stems", "gpu_suite", "article", "bare", "peers"):
        assert f"`{name}" in page, name


def results() -> dict[str, dict[str, object]]:
    rows = [target("a | b", 0.5, at_most=1.0), target("c", None, at_least=2.0), target("d", 1.0, at_least=0.5, interval=(0.4, 1.6))]
    return {"b": {"hardware": "x, 2 CPUs", "commit": "abc", "targets": rows}, "a": {"hardware": "x"}}


def test_rewriting_the_table_twice_changes_nothing_and_nothing_outside_of_it():
    page = f"# Before\n\n{readme.BEGIN}\nold\n{readme.END}\n\nafter\n"
    once = readme.rewritten(page, results())
    assert readme.rewritten(once, results()) == once
    assert once.startswith("# Before\n\n")
    assert once.endswith(f"{readme.END}\n\nafter\n")
    table = once[once.index(readme.BEGIN) :]
    assert "| `b` | a \\| b | 0.5 | ≤ 1 | met | x, 2 CPUs | abc |" in table
    assert "not measured" in table
    assert "1 (0.4 to 1.6) | ≥ 0.5 | undecided" in table
    assert table.index("`a`") < table.index("`b`")
    assert "old" not in once


def test_a_page_without_its_markers_is_refused():
    with pytest.raises(ValueError, match="each once"):
        readme.rewritten("nothing", results())


def test_command_rewrites_the_page_and_check_says_whether_it_fits(tmp_path):
    page, folder = tmp_path / "README.md", tmp_path / "results"
    folder.mkdir()
    page.write_text(f"{readme.BEGIN}\n{readme.END}\n")
    for name, result in results().items():
        (folder / f"{name}.json").write_text(json.dumps(result))
    where = ["--page", str(page), "--results", str(folder)]
    assert readme.main([*where, "--check"]) == 1
    assert readme.main(where) == 0
    assert readme.main([*where, "--check"]) == 0


def test_a_converted_data_set_serves_as_the_tutorials_archive_again_and_again_if_it_is_small(tmp_path):
    from benchmarks.article import Cifar10, read_batches
    from dataio.parquet import open_dataset

    count = open_dataset(common.SAMPLE).split("train").count
    archive, data = common.cifar_like(tmp_path, str(common.SAMPLE), train=count + 500, test=50)
    script = Cifar10(read_batches(archive), True, np.asarray)
    assert len(script) == count + 500
    assert open_dataset(data).split("train").count == count + 500
    np.testing.assert_array_equal(script[count][0], np.roll(script[0][0], 1, axis=1))
    assert script[count][1] == script[0][1]
    assert len({script[i][0].tobytes() for i in range(0, count + 500, 7)}) > 300
    assert len(Cifar10(read_batches(archive), False, np.asarray)) == 50


def test_both_ways_to_the_archive_hold_the_same_pixels(tmp_path):
    """Converting an archive and making one of that again loses nothing."""
    from benchmarks.article import Cifar10, read_batches

    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    source = str(common.SAMPLE)
    first, converted = common.cifar_like(tmp_path / "first", source, train=100, test=20)
    second, _ = common.cifar_like(tmp_path / "second", str(converted), train=100, test=20)
    for is_train in (True, False):
        ours, again = (Cifar10(read_batches(archive), is_train, np.asarray) for archive in (first, second))
        np.testing.assert_array_equal(ours.images, again.images)
        assert ours.labels == again.labels

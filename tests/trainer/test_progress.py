"""The progress line and the final table, as a terminal and as a job's log get them."""

import io
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from trainer.runs.progress import CAUSES, ProgressLine, RunState, describe, final_table, summary_rows, time_split
from trainer.runs.summary import accounting
from trainer.settings.units import duration, flops, number, percent, size

STATE = RunState(
    run="pets",
    phase="training",
    step=350,
    total_steps=5000,
    epoch=0.7,
    epochs=10,
    loss=1.23456,
    learning_rate=0.02,
    images_per_second=12345.6,
    data_wait_ratio=0.021,
    headline=0.874,
    checkpoint_step=300,
    checkpoint_age_seconds=12.0,
    remaining_seconds=187.0,
    restarts=1,
)
SUMMARY = {
    "run": "pets",
    "status": "finished",
    "steps": 160,
    "epochs": 4.0,
    "test_accuracy": 0.884,
    "train_loss": 0.31,
    "images_per_second": 71.4,
    "goodput": 0.93,
    "restarts": 2,
    "checkpoints": 5,
    "seconds": 112.0,
    "quarantined": 0,
    "accounting": {"steps": 90.0, "data_wait": 2.0, "recovery": 20.0, "other": 0.0},
}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def log_console() -> tuple[Console, io.StringIO]:
    written = io.StringIO()
    return Console(file=written, force_terminal=False, width=80), written


def test_line_tells_everything_that_is_known() -> None:
    assert describe(STATE) == (
        "pets: training  epoch 1/10  step 350/5,000  3:07 min left  loss 1.2346  test 87.4 %  lr 0.02  12,346 images/s  data wait 2.1 %  "
        "saved at 300 (12 s ago)  1 restart"
    )


def test_line_names_the_measure_and_the_samples_of_another_task() -> None:
    said = describe(replace(STATE, headline_title="test mAP", unit="texts"))
    assert "  test mAP 87.4 %  " in said
    assert "  12,346 texts/s  " in said
    assert "  test MAE 3.912  " in describe(replace(STATE, headline=3.91234, headline_title="test MAE", headline_unit="number"))


def test_line_leaves_out_what_is_not_known_yet() -> None:
    assert describe(RunState(run="pets", phase="starting")) == "pets: starting"


def test_the_last_step_belongs_to_the_last_epoch() -> None:
    assert "epoch 10/10  step 5,000/5,000" in describe(replace(STATE, step=5000, epoch=10.0))


def test_a_log_gets_a_whole_line_now_and_then() -> None:
    console, written = log_console()
    clock = Clock()
    with ProgressLine(console, every_seconds=10, clock=clock) as line:
        for second in range(25):
            clock.now = float(second)
            line.update(replace(STATE, step=350 + second))
    lines = written.getvalue().splitlines()
    assert [re.search(r"step (\d+)", text)[1] for text in lines] == ["350", "360", "370"]  # type: ignore[index]
    assert all(text.endswith("1 restart") for text in lines)  # longer than the console, and not broken
    assert "\x1b" not in written.getvalue()


def test_a_log_gets_news_at_once() -> None:
    console, written = log_console()
    with ProgressLine(console, every_seconds=1000, clock=Clock()) as line:
        line.update(replace(STATE, phase="starting", restarts=0))
        line.update(replace(STATE, restarts=0))
        line.update(replace(STATE, restarts=0, step=351))  # no news
        line.update(replace(STATE, restarts=1, step=340))
        line.update(replace(STATE, step=5000))
        line.update(replace(STATE, step=5000))  # told already
    assert len(written.getvalue().splitlines()) == 4


def test_a_log_does_not_repeat_itself_while_nothing_happens() -> None:
    console, written = log_console()
    clock = Clock()
    with ProgressLine(console, every_seconds=10, clock=clock) as line:
        for second in range(60):
            clock.now = float(second)
            line.update(RunState(run="pets", phase="starting workers"))
    assert written.getvalue() == "pets: starting workers\n"


def test_waiting_says_how_long_it_has_been() -> None:
    assert describe(RunState(run="pets", phase="starting workers", phase_seconds=12.7)) == "pets: starting workers (12 s)"
    assert describe(RunState(run="pets", phase="starting workers", phase_seconds=0.7)) == "pets: starting workers"


def test_a_message_is_text_and_not_markup() -> None:
    console, written = log_console()
    with ProgressLine(console) as line:
        line.message("worker [red]2[/red] was lost: " + "x" * 100)
    assert written.getvalue() == "worker [red]2[/red] was lost: " + "x" * 100 + "\n"


@pytest.mark.parametrize("width", [200, 80, 40])
def test_a_terminal_shows_one_line_and_gets_it_back_clean(width: int) -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=width, height=20, color_system=None, legacy_windows=False)
    clock = Clock()
    with ProgressLine(console, clock=clock) as line:
        for step in (350, 360, 370):
            clock.now += 1.0
            line.update(replace(STATE, step=step))
        assert "\n" not in written.getvalue()  # one line, redrawn in place, never wrapped
        line.message("checkpoint damaged")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue())
    assert "checkpoint damaged\n" in plain.replace("\r", "\n")
    assert written.getvalue().rstrip().endswith(("\x1b[2K", "\x1b[?25h", "\x1b[1A\x1b[2K"))
    assert plain.count("pets: training") >= 3


def test_closing_twice_is_fine() -> None:
    line = ProgressLine(Console(file=io.StringIO(), force_terminal=True))
    with line:
        line.update(STATE)
        line.close()
    line.close()


def test_final_table_tells_result_costs_and_what_to_do_next() -> None:
    console, written = log_console()
    path = "/data/runs/" + "long" * 40 + "/report.html"
    console.print(final_table(SUMMARY, report=path, predict="python -m trainer.predict runs/pets IMAGE..."))
    shown = written.getvalue()
    for words in ("pets: finished", "88.40 %", "93.0 %", "1:52 min", "Restarts", "Checkpoints", "data wait", "80.4 %"):
        assert words in shown
    assert path in shown.replace("\n", "")  # longer than the console, but all there
    assert "Predict: python -m trainer.predict runs/pets IMAGE...\n" in shown
    assert "other" not in shown  # took no time


def test_paths_and_commands_can_be_copied_whole() -> None:
    console, written = log_console()
    path, command = "/data/" + "long" * 40 + "/report.html", "python -m trainer.predict /data/" + "long" * 40 + " IMAGE..."
    console.print(final_table(SUMMARY, report=path, predict=command), soft_wrap=True)
    assert f"Report:  {path}\nPredict: {command}\n" in written.getvalue()
    assert all(len(line) <= 80 for line in written.getvalue().splitlines() if "long" not in line)  # the tables keep to the console


def test_rows_that_say_nothing_are_left_out() -> None:
    plain = dict(summary_rows({"workers": 2, "virtual_ranks": 2, "restarts": 0, "recovery_seconds": 0.0}))
    assert plain == {"Workers": "2", "Restarts": "0"}
    eventful = dict(summary_rows({"workers": 2, "virtual_ranks": 4, "restarts": 1, "recovery_seconds": 12.0}))
    assert eventful == {"Workers": "2", "Virtual ranks": "4", "Restarts": "1", "Recovery": "12 s"}


def test_every_cause_of_the_accounting_is_explained() -> None:
    causes = [cause for cause, _, _ in time_split({"accounting": dict.fromkeys(accounting([], {}), 1.0)})]
    assert set(causes) == set(CAUSES)


def test_final_table_of_a_run_that_knows_nothing() -> None:
    console, written = log_console()
    console.print(
        final_table({"run": "pets", "status": "failed", "test_accuracy": None, "accounting": None}, go_on="python -m trainer.run")
    )
    assert "pets: failed" in written.getvalue()
    assert "Go on:   python -m trainer.run\n" in written.getvalue()
    assert "?" not in written.getvalue()


@given(st.dictionaries(st.text(min_size=1, max_size=5), st.floats(0, 1e6), max_size=8))
def test_shares_of_the_time_split_add_up(accounting: dict[str, float]) -> None:
    split = time_split({"accounting": accounting})
    assert len(split) == sum(seconds > 0 for seconds in accounting.values())
    assert not split or abs(sum(share for _, _, share in split) - 1) < 1e-9
    assert [seconds for _, seconds, _ in split] == sorted((seconds for _, seconds, _ in split), reverse=True)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (duration(0.0412), "0.041 s"),
        (duration(4.04), "4.0 s"),
        (duration(59.6), "1:00 min"),
        (duration(187), "3:07 min"),
        (duration(3599.7), "1:00:00 h"),
        (duration(7509), "2:05:09 h"),
        (duration(3 * 86400 + 4 * 3600), "3 d 4 h"),
        (duration(None), "?"),
        (duration(float("nan")), "?"),
        (size(512), "512 B"),
        (size(44_700_000), "44.7 MB"),
        (size(999_600), "1 MB"),
        (size(3e18), "3000 PB"),
        (flops(3.33e9), "3.33 GFLOP"),
        (number(1234567), "1,234,567"),
        (number(4.0), "4"),
        (number(0.123456), "0.1235"),
        (percent(0.8743), "87.4 %"),
        (percent(None), "?"),
    ],
)
def test_numbers_read_well(shown: str, expected: str) -> None:
    assert shown == expected

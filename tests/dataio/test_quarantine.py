"""Claims about the quarantine: counts each bad sample once, raises exactly above its limit, and says which samples and what to do."""

import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataio.quarantine import BadSample, Quarantine, TooManyBadSamples, allowed


def add(quarantine: Quarantine, number: int) -> bool:
    return quarantine.add(f"key{number}", "truncated: half of it", "train", number)


@given(st.integers(1, 2000), st.floats(0, 1, allow_nan=False), st.lists(st.integers(0, 100), max_size=60))
def test_it_raises_as_soon_as_the_fraction_is_exceeded_and_never_before(total: int, fraction: float, met: list[int]):
    quarantine = Quarantine(fraction, total)
    seen: set[int] = set()
    for number in met:
        new = number not in seen
        seen.add(number)
        if new and len(seen) > allowed(fraction, total):
            with pytest.raises(TooManyBadSamples):
                add(quarantine, number)
            return
        assert add(quarantine, number) == new
    assert quarantine.count == len(seen)


def test_the_error_names_count_limit_the_first_keys_with_reasons_and_the_fix():
    quarantine = Quarantine(0.012, 1000)
    for number in range(12):
        add(quarantine, number)
    with pytest.raises(TooManyBadSamples) as caught:
        add(quarantine, 12)
    text = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert text.startswith("13 of 1000 samples are bad so far, more than the 12 that data.max_bad_fraction=0.012 allows")
    assert all(f"train key{number}: truncated: half of it" in text for number in range(5))
    assert "key5" not in text
    assert "and 8 more" in text
    assert "--data.max-bad-fraction 0.013 or more" in text


@given(st.integers(0, 100_000), st.floats(0, 1, allow_nan=False))
def test_some_of_few_samples_may_be_bad_whatever_the_fraction_unless_it_is_0(total: int, fraction: float):
    assert allowed(0.0, total) == 0
    assert allowed(fraction, total) <= max(fraction, 0.1) * total
    if fraction:
        assert allowed(fraction, total) >= min(10, total // 10)
        assert allowed(fraction, total) >= int(fraction * total)
    if fraction * total >= 10:
        assert allowed(fraction, total) == int(fraction * total)


def test_four_bad_photographs_of_76_are_left_out_and_eight_are_too_many():
    quarantine = Quarantine(0.001, 76)
    for number in range(7):
        add(quarantine, number)
    with pytest.raises(TooManyBadSamples, match="8 of 76 samples are bad so far, more than the 7 that"):
        add(quarantine, 7)


@pytest.mark.parametrize(("bad", "is_advised"), [(5, True), (11, True), (12, False), (22, False)])
def test_nobody_is_advised_to_leave_out_most_of_the_samples(bad: int, is_advised: bool):
    quarantine = Quarantine(0.001, None)
    for number in range(bad):
        add(quarantine, number)
    with pytest.raises(TooManyBadSamples) as caught:
        quarantine.finish(22)
    assert ("--data.max-bad-fraction" in str(caught.value)) == is_advised
    assert ("most of the samples" in str(caught.value)) != is_advised


def test_the_suggested_fraction_is_enough():
    for bad, total in ((1, 3), (7, 1000), (13, 60_001), (1, 2)):
        quarantine = Quarantine(0.0, total)
        quarantine._records = {("train", n): BadSample(key="k", reason="r: r", split="train", sample_id=n) for n in range(bad)}
        with pytest.raises(TooManyBadSamples) as caught:
            quarantine.finish(total)
        suggested = float(str(caught.value).split("--data.max-bad-fraction ")[1].split(" ")[0])
        lenient = Quarantine(suggested, total)
        lenient.restore(quarantine.records)
        assert lenient.count == bad


def test_a_sample_met_every_epoch_counts_and_is_reported_once():
    reported: list[BadSample] = []
    quarantine = Quarantine(1.0, 10, reported.append)
    assert [add(quarantine, 3) for _ in range(5)] == [True, False, False, False, False]
    assert quarantine.count == len(reported) == 1
    assert reported[0].kind == "truncated"
    assert ("train", 3) in quarantine
    assert ("test", 3) not in quarantine


def test_the_same_id_in_another_split_is_another_sample():
    quarantine = Quarantine(1.0, 10)
    assert quarantine.add("k", "empty: no bytes", "train", 1)
    assert quarantine.add("k", "empty: no bytes", "test", 1)
    assert quarantine.count == 2


def test_without_a_total_nothing_raises_before_the_end():
    quarantine = Quarantine(0.01, None)
    for number in range(15):
        add(quarantine, number)
    with pytest.raises(TooManyBadSamples, match="15 of 1499 samples"):
        quarantine.finish(1499)
    quarantine.finish(1500)


def test_the_record_that_breaks_the_limit_is_reported_too():
    reported: list[BadSample] = []
    quarantine = Quarantine(0.0, 10, reported.append)
    with pytest.raises(TooManyBadSamples):
        add(quarantine, 1)
    assert [record.key for record in reported] == ["key1"]


def test_restored_records_count_but_are_not_reported_again():
    reported: list[BadSample] = []
    quarantine = Quarantine(0.2, 10, reported.append)
    quarantine.restore([BadSample(key="a", reason="empty: no bytes", split="train", sample_id=4)])
    assert not quarantine.add("a", "empty: no bytes", "train", 4)
    assert (quarantine.count, reported) == (1, [])


def test_threads_count_exactly():
    quarantine = Quarantine(1.0, 10_000)
    threads = [threading.Thread(target=lambda: [add(quarantine, number) for number in range(500)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert quarantine.count == 500


@given(st.text(), st.text(), st.integers(0, 2**40))
def test_a_record_survives_its_line(key: str, reason: str, sample_id: int):
    record = BadSample(key=key, reason=reason, split="test", sample_id=sample_id)
    line = record.to_line()
    assert line.count("\n") == 1
    assert BadSample.from_json(json.loads(line)) == record


@pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan")])
def test_a_limit_that_is_no_fraction_is_refused(fraction: float):
    with pytest.raises(ValueError, match=r"data\.max_bad_fraction"):
        Quarantine(fraction, 10)


@pytest.mark.parametrize(("bad", "advised"), [(5, True), (6, False), (10, False)])
def test_to_leave_out_most_of_the_samples_is_no_advice(bad: int, advised: bool):
    quarantine = Quarantine(0.0, None)
    for number in range(bad):
        quarantine.add(f"{number}.png", "unsupported: a TIFF of 12 bits", "train", number)
    with pytest.raises(TooManyBadSamples) as caught:
        quarantine.finish(10)
    assert ("--data.max-bad-fraction" in str(caught.value)) == advised
    assert ("the reasons say why" in str(caught.value)) != advised

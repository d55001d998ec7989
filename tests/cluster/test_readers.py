"""A run's end waits for those who read it, as long as they need, and for nobody else."""

import threading

from hypothesis import given
from hypothesis import strategies as st

from cluster.readers import LATE_SECONDS, MOST_SECONDS, REFRESH_HEADER, SCRAPE_HEADER, UNKNOWN_SECONDS, Reader, Readers, due_seconds

SCRAPE, REFRESH = {SCRAPE_HEADER: "5"}, {REFRESH_HEADER: "7"}


def readers(now: list[float]) -> Readers:
    return Readers(clock=lambda: now[0])


def test_nobody_reads_and_nobody_is_waited_for() -> None:
    known = readers([100.0])
    assert known.due_seconds("/metrics", 100.0) == 0
    known.wait("/metrics", 100.0)


def test_a_person_with_curl_is_no_reader() -> None:
    known = readers([100.0])
    known.heard("/metrics", "127.0.0.1", 99.0, {"user-agent": "curl/8"})
    assert known.due_seconds("/metrics", 100.0) == 0


def test_prometheus_is_waited_for_as_long_as_its_interval_and_what_it_has_read_is_read() -> None:
    known = readers([103.0])
    for began in (90.0, 95.0, 100.0):
        known.heard("/metrics", "127.0.0.1", began, SCRAPE)
    assert known.due_seconds("/metrics", 103.0) == 100 + 1.5 * 5 + LATE_SECONDS - 103
    assert known.due_seconds("/metrics", 99.0) == 0
    assert known.due_seconds("/sd", 103.0) == 0
    known.heard("/metrics", "127.0.0.1", 105.0, SCRAPE)
    assert known.due_seconds("/metrics", 103.0) == 0


def test_a_question_for_targets_says_its_own_interval() -> None:
    known = readers([101.0])
    known.heard("/sd", "127.0.0.1", 100.0, REFRESH)
    assert known.due_seconds("/sd", 101.0) == 1.5 * 7 + LATE_SECONDS - 1
    known.heard("/sd", "127.0.0.1", 101.0, {REFRESH_HEADER: "soon"})
    assert known.due_seconds("/sd", 102.0) < UNKNOWN_SECONDS


def test_two_jobs_of_one_prometheus_are_given_the_time_of_each() -> None:
    known = readers([103.0])
    for began in (95.0, 97.0, 100.0, 102.0):
        known.heard("/metrics", "127.0.0.1", began, SCRAPE)
    assert known.due_seconds("/metrics", 103.0) == 102 + 1.5 * 5 + LATE_SECONDS - 103


def test_each_of_two_readers_is_waited_for() -> None:
    now = [100.0]
    known = readers(now)
    for client, interval in (("10.0.0.1", 5.0), ("10.0.0.2", 30.0)):
        known.heard("/metrics", client, 99.0 - interval, SCRAPE)
        known.heard("/metrics", client, 99.0, SCRAPE)
    known.heard("/metrics", "10.0.0.1", 101.0, SCRAPE)
    assert known.due_seconds("/metrics", 100.0) == 99 + 45 + LATE_SECONDS - 100


@given(last=st.floats(0, 1000), interval=st.floats(0.01, 1000), since=st.floats(0, 2000), now=st.floats(0, 3000), later=st.floats(0, 1000))
def test_a_wait_is_bounded_never_grows_and_ends_for_one_that_comes_no_more(
    last: float, interval: float, since: float, now: float, later: float
) -> None:
    reader = Reader(last=last, interval_seconds=interval)
    due = due_seconds(reader, since, now)
    assert 0 <= due <= MOST_SECONDS
    assert due_seconds(reader, since, now + later) <= due
    assert due_seconds(reader, since, last + 2 * interval + 2 * LATE_SECONDS) == 0
    assert since > last or due == 0


def test_a_wait_ends_with_the_read() -> None:
    known = Readers()
    import time

    known.heard("/metrics", "127.0.0.1", time.monotonic(), SCRAPE)
    since = time.monotonic()
    read = threading.Timer(0.1, lambda: known.heard("/metrics", "127.0.0.1", time.monotonic(), SCRAPE))
    read.start()
    known.wait("/metrics", since)
    assert known.due_seconds("/metrics", since) == 0
    assert time.monotonic() - since < 5
    read.join()

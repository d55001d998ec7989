"""Claims about the log: whole records come back in order, a torn one at the end is none, a new log takes the old one's place at once."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.wal import Log, read_log


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=40), max_size=6), st.lists(st.binary(max_size=40), max_size=6), st.data())
def test_what_was_written_whole_comes_back_wherever_the_writer_died(
    tmp_path: Path, first: list[bytes], more: list[bytes], data: st.DataObject
) -> None:
    path = tmp_path / "log"
    log = Log(path)
    log.begin(first)
    ends = [log.size_bytes]
    for record in more:
        log.append(record)
        ends.append(log.size_bytes)
    log.close()
    assert read_log(path) == [*first, *more]
    content = path.read_bytes()
    assert len(content) == ends[-1]
    cut = data.draw(st.integers(ends[0], len(content)))
    path.write_bytes(content[:cut])
    assert read_log(path) == [*first, *more[: sum(end <= cut for end in ends[1:])]]


@pytest.mark.parametrize("at", [0, 5, 9])
def test_a_record_that_was_damaged_hides_those_behind_it(tmp_path: Path, at: int) -> None:
    path = tmp_path / "log"
    log = Log(path)
    log.begin([b"one"])
    before = log.size_bytes
    log.append(b"two")
    log.append(b"three")
    content = bytearray(path.read_bytes())
    content[before + at] ^= 1
    path.write_bytes(content)
    assert read_log(path) == [b"one"]


def test_a_new_log_replaces_the_old_one_whose_writer_may_still_write(tmp_path: Path) -> None:
    path = tmp_path / "log"
    old, new = Log(path), Log(path)
    old.begin([b"old"])
    new.begin([b"snapshot"])
    old.append(b"too late")
    new.append(b"new")
    assert read_log(path) == [b"snapshot", b"new"]
    assert path.stat().st_mode & 0o777 == 0o600
    new.discard()
    assert read_log(path) is None
    assert list(tmp_path.iterdir()) == []
    new.discard()

"""Claims about bad samples: each counts once, and what is written down comes back."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cluster.quarantined import Quarantined


def record(split: str, sample_id: int, key: str = "k") -> dict[str, Any]:
    return {"key": key, "reason": "truncated", "split": split, "sample_id": sample_id}


RECORDS = st.lists(st.builds(record, st.sampled_from(["train", "test"]), st.integers(0, 5), st.text(max_size=8)))


@given(st.lists(RECORDS))
def test_a_sample_counts_once_and_comes_back_from_the_file(batches: list[list[dict[str, Any]]]) -> None:
    bad, met = Quarantined(), []
    for batch in batches:
        met += bad.add(batch)
    identities = [(each["split"], each["sample_id"]) for each in met]
    assert len(identities) == len(set(identities)) == len(bad)
    assert set(identities) == {(each["split"], each["sample_id"]) for batch in batches for each in batch}
    again = Quarantined.from_lines(bad.to_lines())
    assert len(again) == len(bad)
    assert again.to_lines() == bad.to_lines()
    assert again.add(met) == []


def test_a_line_is_an_object_with_sorted_keys() -> None:
    assert Quarantined([record("train", 3)]).to_lines() == b'{"key": "k", "reason": "truncated", "sample_id": 3, "split": "train"}\n'
    assert Quarantined().to_lines() == b""

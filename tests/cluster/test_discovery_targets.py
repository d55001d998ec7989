"""Claims about the list that Prometheus reads. That it is served and written is in test_coordinator.py."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from cluster.roster import RankInfo
from cluster.targets import targets_of
from cluster.whose import namespace_here, owner_here


@given(ranks=st.dictionaries(st.integers(0, 2000), st.booleans(), max_size=20), attempt=st.integers(0, 50))
def test_those_that_serve_metrics_are_listed_in_order_and_the_coordinator_last(ranks: dict[int, bool], attempt: int) -> None:
    infos = {rank: RankInfo(host="h", pid=1, node_id="n", metrics_address=f"h:{rank}" if serves else "") for rank, serves in ranks.items()}
    *listed, coordinator = targets_of("pets", attempt, infos, "h:9000")
    assert listed == [
        {"targets": [f"h:{rank}"], "labels": {"run": "pets", "rank": str(rank), "attempt": str(attempt)}}
        for rank, serves in sorted(ranks.items())
        if serves
    ]
    assert coordinator == {"targets": ["h:9000"], "labels": {"run": "pets", "rank": "coordinator", "attempt": "0"}}
    anns = targets_of("pets", attempt, infos, "h:9000", "ann")
    assert [target["labels"] for target in anns] == [{"namespace": "ann", **target["labels"]} for target in (*listed, coordinator)]


def test_a_namespace_is_the_pods_or_the_accounts_name(tmp_path: Path) -> None:
    mounted = tmp_path / "namespace"
    assert namespace_here({"POD_NAMESPACE": "team-a"}, mounted) == "team-a"
    assert namespace_here({}, mounted) == owner_here() != ""
    mounted.write_text("team-b\n")
    assert namespace_here({}, mounted) == "team-b"
    mounted.write_text("\n")
    assert namespace_here({}, mounted) == owner_here()

"""Claims about secrets: none of a URI's is written down, and nothing else is changed."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.journal import Journal
from cluster.ray_cluster import check_guarded
from cluster.redact import redact, redacted
from cluster.storage import open_storage

WORDS = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=8, max_size=20)


@given(WORDS, WORDS, WORDS)
def test_no_secret_of_a_uri_survives(user: str, secret: str, bucket: str):
    uri = f"s3://{user}:SECRET{secret}@{bucket}/runs?region=eu&secret_key=SECRET{secret}&endpoint_override=h:9000"
    shown = redact(f"python -m trainer.run --storage '{uri}' --run x")
    assert "SECRET" not in shown
    assert shown == f"python -m trainer.run --storage 's3://***@{bucket}/runs?region=eu&secret_key=***&endpoint_override=h:9000' --run x"


@given(st.text().filter(lambda text: "://" not in text and "=" not in text))
def test_other_text_stays_as_it_is(text: str):
    assert redact(text) == text


def test_an_address_without_a_secret_stays_as_it_is():
    for text in ("s3://bucket/runs?endpoint_override=127.0.0.1:9000", "http://127.0.0.1:8265", "a@b.c", "gs://b/a@b"):
        assert redact(text) == text


def test_the_journal_never_carries_one(tmp_path: Path):
    Journal.open(open_storage(tmp_path), "run", "w").write(
        "run_started", command="--storage s3://me:SECRET@b", nested=[{"uri": "s3://k:SECRET@b"}]
    )
    (line,) = (tmp_path / "run" / "journal.jsonl").read_text().splitlines()
    assert "SECRET" not in line
    assert json.loads(line)["nested"] == [{"uri": "s3://***@b"}]
    assert redacted({"a": (1, "x://y@z")}) == {"a": [1, "x://***@z"]}


@pytest.mark.parametrize("head", ["10.0.0.5:6379", "[2001:db8::1]:6379", "192.168.1.2:6379"])
def test_a_head_that_others_reach_must_ask_for_a_token(head: str):
    with pytest.raises(ValueError, match=r"asks for no token.*--cluster.allow-unauthenticated"):
        check_guarded(head, has_token=False)
    check_guarded(head, has_token=True)


@pytest.mark.parametrize("head", ["127.0.0.1:6379", "localhost:6379", "[::1]:6379"])
def test_a_head_on_the_machine_itself_need_not(head: str):
    check_guarded(head, has_token=False)

"""Claims about foreign text: what is shown moves no cursor, hides nothing, and holds no secret; what is plain stays as it is."""

import json
import re
import unicodedata
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dataio.text
from cluster import text as module
from cluster.text import MASK, address, has_secrets, json_line, printable, redact, shown

ANY = st.text(st.characters(codec=None), max_size=60)  # surrogates too
STEERING = ("\x1b", "\x07", "\r", "\x00", "\x7f", "\x9b", "\u202e", "\u2066", "\u200b", "\u2028", "\ufeff", "\udcff", "\U000e0041")
SECRETS = st.text("abcXYZ0189/@:+=", min_size=8, max_size=40).filter(lambda secret: secret.strip("/@:+=") and "://" not in secret)
PROJECT = Path(__file__).resolve().parents[2]


def moves(text: str) -> set[str]:
    """The characters that a terminal may obey, or that a reader cannot see."""
    return {character for character in text if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")}


@given(ANY)
def test_what_is_shown_moves_no_cursor_and_stays_on_its_line(text: str) -> None:
    assert not moves(shown(text))
    assert moves(printable(text)) <= {"\n", "\t"}
    shown(text).encode()  # valid UTF-8
    assert shown(shown(text)) == shown(text)


@pytest.mark.parametrize("steering", STEERING)
def test_what_steers_is_seen(steering: str) -> None:
    assert re.fullmatch(r"a\\(x[0-9a-f]{2}|r|u[0-9a-f]{4}|U[0-9a-f]{8})b", shown(f"a{steering}b"))


def test_a_byte_that_is_not_utf8_is_shown_as_that_byte() -> None:
    assert shown(b"caf\xe9.png".decode("utf-8", "surrogateescape")) == r"caf\xe9.png"


def test_text_of_any_language_stays_as_it_is() -> None:
    for text in ("Katze", "naïve café", "猫と犬", "кошка", "قطة", "😀", "a\u00a0b", r"C:\new"):
        assert shown(text) == printable(text) == text


@given(ANY, st.integers(1, 100))
def test_what_is_shown_is_no_longer_than_asked(text: str, limit: int) -> None:
    assert len(shown(text, limit)) <= limit


@given(st.recursive(ANY, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY, inner, max_size=3), max_leaves=6))
def test_a_line_for_programs_is_json_of_the_same_value(value: object) -> None:
    line = json_line(value)
    assert not moves(line)
    line.encode()
    if not any("\ud800" <= character <= "\udfff" for character in json.dumps(value, ensure_ascii=False)):
        assert json.loads(line) == value


def test_both_packages_have_the_same_rules() -> None:
    assert Path(dataio.text.__file__).read_bytes() == Path(module.__file__).read_bytes(), "cp cluster/text.py dataio/text.py"


# --- secrets ------------------------------------------------------------------------------------------------------------------------------

FORMS = (
    "s3://AKIAKEY:{}@bucket/runs?region=eu",
    "python -m trainer.run --storage s3://AKIAKEY:{}@bucket --run x",
    "Cannot parse URI: 's3://AKIAKEY:{}@bucket/x' due to syntax error at character '/' (position 12)",
    "gs://user:{}@bucket/x",
    "https://user:{}@host:8080/x",
    "abfs://container:{}@account.dfs.core.windows.net/x",
    "s3://bucket/runs?access_key=AKIAKEY&secret_key={}&region=eu",
    "s3://bucket?endpoint_override=h:9000&session_token={}",
    "https://account.blob.core.windows.net/c?sv=2022-11-02&se=2026&sig={}",
    "abfs://c@a.dfs.core.windows.net/x?sas_token={}",
    'storage = "s3://AKIAKEY:{}@bucket/runs"',
    'secret_key = "{}"',
    '{{"uri": "s3://k:{}@b", "secret_access_key": "{}"}}',
    "AWS_SECRET_ACCESS_KEY={} python -m trainer.run",
    "env: {{'AWS_SESSION_TOKEN': '{}'}}",
    "Authorization: AWS4-HMAC-SHA256 Credential=AKIA/20261128/eu/s3/aws4_request, Signature={}",
    "two: s3://a:{}@b and s3://c:{}@d",
)


@settings(max_examples=40)
@given(secret=SECRETS)
@pytest.mark.parametrize("form", FORMS)
def test_no_secret_survives_whatever_its_characters(form: str, secret: str) -> None:
    for written in (secret, quote(secret, safe="")):
        text = form.replace("{}", written).replace("{{", "{").replace("}}", "}")
        for left in (redact(text), shown(text), printable(text)):
            assert MASK in left
            assert written not in left, left
            assert not [part for part in re.findall(r"[abcXYZ0189]{5,}", secret) if part in left], left
        assert has_secrets(text)
        assert redact(redact(text)) == redact(text)


@given(secret=SECRETS.filter(lambda secret: "@" not in secret))
def test_what_is_left_of_a_secret_that_was_cut_off_does_not_survive(secret: str) -> None:
    assert redact(f"s3://AKIAKEY:{secret}") == f"s3://{MASK}"


@given(st.text().filter(lambda text: "://" not in text and "=" not in text and not re.search(r":\s*\\?['\"]", text)))
def test_text_without_secrets_stays_as_it_is(text: str) -> None:
    assert redact(text) == text or re.search(r"(?i)bearer |basic ", text)


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/runs?endpoint_override=127.0.0.1:9000&scheme=http",
        "http://127.0.0.1:8265/a@b",
        "http://[::1]:8265/x@y",
        "gs://b/a@b",
        "hdfs://name:8020/a@b",
        "abfs://container@account.dfs.core.windows.net/path",
        "file:///data/a:b@c",
        "git@github.com:owner/name.git",
        "a@b.c",
        "asks for no token: set one",
        "max_tokens=128 token=None",
        "python -m trainer.run --train.epochs 3 --data.path '/a b/c#d?e'",
    ],
)
def test_an_address_without_a_secret_stays_as_it_is(text: str) -> None:
    assert redact(text) == text


def test_an_address_is_scheme_host_and_path() -> None:
    assert address("s3://KEY:a/b@c@bucket/runs/?region=eu&secret_key=x") == "s3://bucket/runs"
    assert address("/data/runs?x") == "/data/runs?x"
    assert address("abfs://c:key@a/x") == "abfs://c:***@a/x"


def test_long_text_takes_no_longer_than_its_length() -> None:
    """Text of a hostile journal: each rule passes over it once."""
    for piece in ("a", "token", "s3:", "://", "@", "key=", "secret ", "bearer "):
        printable(piece * (200_000 // len(piece)))

"""Who may ask, how often, and how many at once. `front` asks these before it reads a body. Pure: the clock is an argument.

All counts are of one process, the only replica of `front`, so they are exact however many replicas compute.
"""

import contextlib
import hashlib
import hmac
import os
import re
from collections.abc import Iterator, Mapping, Sequence

from dataio.foreign import MAX_SETTINGS_BYTES, read_regular

TOKEN_VARIABLE = "FINETUNE_SERVE_TOKEN"
SHORTEST_TOKEN = 16
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]+")  # what may follow `Bearer` (RFC 6750)
SECOND_NS = 1_000_000_000


class Tokens:
    """The bearer tokens that are known."""

    def __init__(self, tokens: Sequence[str]) -> None:
        """ValueError, which does not show them, for tokens that cannot be sent or are easily guessed."""
        if not tokens:
            raise ValueError("there is no token; write one a line, such as `openssl rand -hex 32` gives")
        for number, token in enumerate(tokens, 1):
            if not _TOKEN.fullmatch(token):
                raise ValueError(f"token {number} has characters that no bearer token has; use letters, digits and ._~+/=-")
            if len(token) < SHORTEST_TOKEN:
                raise ValueError(
                    f"token {number} has {len(token)} characters; use {SHORTEST_TOKEN} or more, such as `openssl rand -hex 32`"
                )
        self._known = [token.encode() for token in dict.fromkeys(tokens)]

    def key_of(self, authorization: str) -> str:
        """A name for the token in an Authorization header, by which requests are counted; "" if it is none of ours. The time that this
        takes tells nothing of the tokens."""
        scheme, _, given = authorization.partition(" ")
        word = given.strip().encode("latin-1", "replace")
        found = b""
        for known in self._known:
            if hmac.compare_digest(word, known):
                found = known
        return hashlib.sha256(found).hexdigest() if found and scheme.lower() == "bearer" else ""


def read_tokens(token_file: str, environment: Mapping[str, str] = os.environ) -> Tokens | None:
    """The tokens of the file, else of the environment; None if neither names one. Empty lines and lines that begin with # do not count.
    ValueError for a file that cannot be read or that has none."""
    if token_file:
        try:
            text = read_regular(os.path.expanduser(token_file), MAX_SETTINGS_BYTES).decode("ascii", "replace")
        except OSError as error:
            raise ValueError(
                f"--token-file {token_file} cannot be read ({error.strerror or error}); name a file with a token a line"
            ) from None
        where = f"--token-file {token_file}"
    else:
        text, where = environment.get(TOKEN_VARIABLE, ""), TOKEN_VARIABLE
        if not text.strip():
            return None
    lines = (line.strip() for line in text.splitlines())
    try:
        return Tokens([line for line in lines if line and not line.startswith("#")])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


class TokenBucket:
    """Lets through `per_second` requests a second on average, and a second's worth (one at least) at once.

    The generic cell rate algorithm (ITU-T I.371), in whole nanoseconds, so that it is exact: the state is the time at which the bucket
    would be full again."""

    def __init__(self, per_second: float) -> None:
        """ValueError unless `per_second` is above 0."""
        if not per_second > 0:
            raise ValueError(f"a rate of {per_second:g} requests a second lets nothing through; use a number above 0")
        self.interval_ns = max(1, round(SECOND_NS / per_second))
        self.burst = max(1, int(per_second))
        self._full_at_ns: int | None = None

    def take(self, now_ns: int) -> int:
        """Take a request at the time `now_ns`, which never goes back. Returns 0, or the nanoseconds until one could be taken."""
        full_at = now_ns if self._full_at_ns is None else max(self._full_at_ns, now_ns)
        early = full_at - now_ns - (self.burst - 1) * self.interval_ns
        if early > 0:
            return early
        self._full_at_ns = full_at + self.interval_ns
        return 0


class Rates:
    """A bucket for each token."""

    def __init__(self, per_second: float) -> None:
        """0: no limit."""
        self._per_second = per_second
        self._buckets: dict[str, TokenBucket] = {}

    def take(self, key: str, now_ns: int) -> int:
        """Count a request of the token `key` ("" for all who need none). Returns 0, or after how many nanoseconds to ask again."""
        if not self._per_second:
            return 0
        if key not in self._buckets:  # there are no more keys than tokens
            self._buckets[key] = TokenBucket(self._per_second)
        return self._buckets[key].take(now_ns)


class Full(Exception):
    """As many requests are under way as may be."""


class Admission:
    """Counts requests that are under way."""

    def __init__(self, most: int) -> None:
        self.most, self.inside = most, 0

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """One more request is inside meanwhile, however it ends. Full, at once, if there are `most`."""
        if self.inside >= self.most:
            raise Full
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

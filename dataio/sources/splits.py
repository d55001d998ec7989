"""Which samples are held out where a source has no split to test with. Called by the sources."""

import hashlib

HELD_OUT_SPLITS = ("test", "validation", "valid", "val", "dev")  # the first that there is serves as "test"


def held_out(key: str, fraction: float) -> bool:
    """Whether a sample belongs to the test split of a source that has none: a pure function of its key."""
    raw = hashlib.blake2b(key.encode(), digest_size=8, person=b"held-out").digest()
    return int.from_bytes(raw, "little") < fraction * 2**64

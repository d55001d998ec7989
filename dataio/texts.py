"""What all of dataio knows of texts: to how many tokens they are padded, and what stands between the two of a pair."""

BETWEEN = "\0"
"""Between the two texts of a pair, in a sample's bytes. It is in no text that is read."""

PARTS = ((64, 8), (256, 16), (1024, 64))
"""Up to so many tokens, a length is a multiple of the second number."""
LONG = 256
"""Of longer ones."""


def padded(tokens: int) -> int:
    """The length to which a text of so many tokens is padded, one of a small set, so that steps have few shapes: 8 for 1 to 8, 80 for 65 to
    80."""
    step = next((step for most, step in PARTS if tokens <= most), LONG)
    return max(1, -(-tokens // step)) * step


def longest_padded_within(most: int) -> int:
    """The length of the longest texts that are padded to no more than `most` tokens; 0 if all are padded to more."""
    step = next((step for limit, step in PARTS if most <= limit), LONG)
    return most // step * step

"""Rows of tokens to batches: implements `dataio.codecs.codec.Codec`. `dataio.codecs.make` makes it, the loader uses it.

A stored text is its tokens (tokens.py). Nothing is drawn at random: a text is the same in every epoch.
"""

from collections.abc import Sequence

import numpy as np
import torch

from dataio.codecs.codec import Bad, Encoded, Ids, Row, Store
from dataio.codecs.device import exact_device, gather
from dataio.codecs.text.tokens import PAD, PART_BIT

VERSION = 1
_BAD_ROW = 0
"""First token of a row whose text could not be read; without any token a model would divide by nothing."""


class TextCodec:
    """Tokens of at most `length` a row, padded with PAD."""

    name = "tokens"
    version = VERSION

    def __init__(self, row: Row, *, vocabulary: int, device: torch.device) -> None:
        self.row = row
        self._vocabulary = vocabulary
        self._device = exact_device(device)

    def room(self, n: int) -> Store:
        return np.empty((n, *self.row.shape), np.int32)

    def decode(self, encoded: Sequence[Encoded], out: Store) -> Bad:
        """Each text's tokens into its row of `out`, (n, T) int32. A damaged one becomes one token, without any meaning."""
        assert isinstance(out, np.ndarray)
        out.fill(PAD)
        bad: list[tuple[int, str]] = []
        for index, each in enumerate(encoded):
            tokens = np.frombuffer(bytes(each[: len(each) // 4 * 4]), "<i4")
            if reason := self._fault_of(tokens, len(each)):
                out[index, 0] = _BAD_ROW
                bad.append((index, f"damaged tokens: {reason}"))
            else:
                out[index, : len(tokens)] = tokens
        return tuple(bad)

    def _fault_of(self, tokens: np.ndarray, size: int) -> str:
        (length,) = self.row.shape
        if size % 4 or not 0 < len(tokens) <= length:
            return f"{size} bytes; 4 a token, and 1 to {length} tokens, are what a text has"
        known = tokens & ((1 << PART_BIT) - 1)
        if tokens.min() < 0 or known.max() >= self._vocabulary:
            return f"a token is not in 0..{self._vocabulary - 1}"
        return ""

    def batch(self, store: Store, rows: Ids, ids: Ids, *, seed: int, epoch: int | None) -> torch.Tensor:
        """(n, T) int32 on the device."""
        return gather(store, rows, self._device)

    def warm_up(self) -> None:
        pass

    def close(self) -> None:
        pass

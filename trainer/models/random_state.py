"""Random draws of a model's layers that neither read nor change the global state. Called by trainer.models.vision and text."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derived_seed(seed: int, what: str) -> int:
    """A separate 63-bit seed for each use, so that one layer's draws do not shift another's."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{what}".encode(), digest_size=8).digest(), "little") >> 1


@contextmanager
def random_state(seed: int) -> Iterator[None]:
    """Inside the context torch's CPU draws follow `seed`; afterwards the global state is restored. Touches no GPU."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
        yield

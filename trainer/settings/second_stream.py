"""The second stream of a run, images without labels (`data.unlabelled`): its order, its seed, and which runs may have one. Pure; the driver
and the ranks call it. No torch. dataio.unlabelled opens the images."""

import hashlib
from collections.abc import Sequence

from dataio.config import unpinned
from dataio.manifest import Manifest
from dataio.order import Order
from dataio.schema import UNLABELLED, Target
from trainer.settings.balance import is_classification
from trainer.settings.tree import RunConfig


def check_unlabelled(config: RunConfig, targets: Sequence[Target]) -> None:
    """ValueError if the run asks for images without labels and does not learn one label."""
    if config.data.unlabelled and not is_classification(config, targets):
        told = ", ".join(f"{target.name} ({target.kind})" for target in targets)
        raise ValueError(
            f"data.unlabelled={unpinned(config.data.unlabelled)[0]} is for a classification with one label an image, and this run learns "
            f"{told} (task.name={config.task.name}); leave it out, or take the one label to learn (--data.targets NAME:label)"
        )


def stream_seed(seed: int) -> int:
    """63-bit seed of the second stream's order and views: an image there and one of the first stream with the same number draw apart."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{UNLABELLED}".encode(), digest_size=8).digest(), "little") >> 1


def order_of_unlabelled(config: RunConfig, manifest: Manifest) -> Order:
    """The order of the second stream (dataio.unlabelled): in each step `train.unlabelled_ratio` times the first's batch. Its epochs are its
    own, and their remainder is always spread: the loss is a mean over the step's images, and one image alone would count as much as a
    batch.
    """
    return Order(
        seed=stream_seed(config.train.seed),
        fingerprint=manifest.fingerprint,
        count=manifest.splits[UNLABELLED].count,
        batch_size=config.data.batch_size * config.train.unlabelled_ratio,
        virtual_ranks=config.train.virtual_ranks,
        window=config.data.shuffle_window,
        spread=True,
    )

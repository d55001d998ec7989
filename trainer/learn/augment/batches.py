"""All that is done to a virtual rank's samples before the task prepares them, in order: the built-in augmentation, the user's own, mixing.
trainer.learn.gradients calls it in the step, trainer.preview for its sheet: so a sheet shows what a step gets.
"""

from collections.abc import Callable

from torch import Tensor

from dataio.batch import Batch
from trainer.learn.augment.mix import Mix, Mixing, mixed
from trainer.learn.augment.views import Views

Own = Callable[[Tensor, int, int], Tensor]
"""The user's augmentation (trainer.learn.own): (images, step, virtual rank) -> images."""


def augmented(batch: Batch, *, views: Views | None, own: Own | None, mix: Mix | None, share_of: int) -> tuple[Tensor, Mixing | None]:
    """The samples that the model gets, and how they were mixed. `share_of`: the first of the virtual ranks that go through the model
    together, by which the mixing is drawn."""
    samples = batch.samples
    if not len(batch.ids):
        return samples, None
    if views is not None:
        samples = views(batch)
    if own is not None:
        samples = own(samples, batch.step, batch.virtual_rank)
    if mix is None:
        return samples, None
    drawn = mix.drawn(samples, step=batch.step, virtual_rank=share_of)
    return mixed(samples, drawn), drawn

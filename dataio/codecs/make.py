"""Which codec a data set has. Called by convert and by the loader. There is one modality, images; another is chosen between here."""

from typing import TYPE_CHECKING

import numpy as np

from dataio.codecs.codec import Checker, Codec, Row
from dataio.config import DataConfig
from dataio.manifest import Manifest, image_size_of

if TYPE_CHECKING:
    import torch


def make_checker(*, max_image_pixels: int, threads: int) -> Checker:
    """What a conversion checks its samples with."""
    from dataio.codecs.image import decode

    return decode.Checker(threads=threads, max_pixels=max_image_pixels)


def row_of(manifest: Manifest, config: DataConfig) -> Row:
    """What the data set's samples decode to under these settings. Raises ValueError where they leave that open."""
    return Row(shape=(*image_size_of(manifest, config), 3), dtype=np.uint8)


def make_codec(
    row: Row, config: DataConfig, *, device: "torch.device", cache: str, threads: int, batch_size: int, table_bytes: int
) -> Codec:
    """`cache` is where decoded samples stay: device, host, none. `batch_size` is the usual size of a batch, not a limit. `table_bytes`:
    memory for tables beside a store that stays the same from batch to batch; 0 where stores change. Raises ValueError for settings that do
    not go together."""
    from dataio.codecs.image.codec import ImageCodec  # here: it needs torch, a conversion does not

    height, width, _ = row.shape
    return ImageCodec(
        height=height,
        width=width,
        config=config,
        device=device,
        cache=cache,
        threads=threads,
        batch_size=batch_size,
        table_bytes=table_bytes,
    )

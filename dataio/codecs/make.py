"""Chooses the codec of a data set, which holds images or texts. Called by convert and by the loader."""

from typing import TYPE_CHECKING

import numpy as np

from dataio.codecs.codec import Checker, Codec, Encoded, Facts, Refusal, Row
from dataio.codecs.text.form import TextForm
from dataio.config import DataConfig
from dataio.manifest import Manifest, TextInfo, shape_of

if TYPE_CHECKING:
    import torch


def make_checker(*, max_image_pixels: int, threads: int, texts: TextForm | None = None) -> Checker:
    """The checker for the samples of a conversion: for texts of the form `texts`, else for images."""
    if texts is not None:
        from dataio.codecs.text.tokens import Checker as TextChecker

        return TextChecker(texts)
    from dataio.codecs.image import decode

    return decode.Checker(threads=threads, max_pixels=max_image_pixels)


def looked_at(encoded: Encoded, *, max_image_pixels: int) -> Facts | Refusal:
    """A sample's facts by its header alone, or the reason to refuse it; a checker may find more. Of a JPEG the first MB and the end are
    enough."""
    from dataio.codecs.image.sniff import sniff

    return sniff(encoded, max_pixels=max_image_pixels)


def row_of(manifest: Manifest, config: DataConfig) -> Row:
    """Type and shape of the decoded samples under these settings. Raises ValueError where the settings leave them open."""
    shape = shape_of(manifest, config)
    return Row(shape=(*shape, 3), dtype=np.uint8) if manifest.texts is None else Row(shape=shape, dtype=np.int32)


def make_codec(
    row: Row,
    config: DataConfig,
    *,
    texts: TextInfo | None = None,
    device: "torch.device",
    cache: str,
    threads: int,
    batch_size: int,
    table_bytes: int,
) -> Codec:
    """`cache` says where decoded samples stay: device, host, none. `batch_size` is the usual size of a batch, not a limit. `table_bytes` is
    the memory for tables next to a store that stays the same from batch to batch; 0 where stores change. `texts`: what the manifest says of
    them. Raises ValueError for settings that contradict each other."""
    if texts is not None:
        from dataio.codecs.text.codec import TextCodec  # here: it needs torch

        return TextCodec(row, vocabulary=texts.vocabulary, device=device)
    from dataio.codecs.image.codec import ImageCodec  # here: it needs torch, which a conversion does not

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

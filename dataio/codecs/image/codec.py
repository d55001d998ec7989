"""The image codec: a decoder, a random draw for each sample, and a backend that crops and flips.

`dataio.codecs.make` makes it, the loader uses it. decode.py decodes, augment.py draws, backends.py moves the pixels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dataio.codecs.codec import Bad, Encoded, Ids, Row, Store
from dataio.codecs.device import copied_from_dali, exact_device, gather, upload
from dataio.codecs.image import augment
from dataio.codecs.image.backends import Backend, choose_backend, make_backend
from dataio.codecs.image.decode import DECODER_VERSIONS, Decoder, decoder_device
from dataio.config import DataConfig


class ImageCodec:
    """Implements `dataio.codecs.codec.Codec`. It builds what it needs at the first call that needs it, in the calling process."""

    def __init__(
        self,
        *,
        height: int,
        width: int,
        config: DataConfig,
        device: torch.device,
        cache: str = "host",
        threads: int = 1,
        batch_size: int = 1,
        table_bytes: int = 0,
    ) -> None:
        self.row = Row(shape=(height, width, 3), dtype=np.uint8)
        decoder = decoder_device(height, width, fit=config.fit, device=device.type)
        self.version = DECODER_VERSIONS[decoder]
        self.name = choose_backend(config.backend, device, cache, decoder=decoder)
        self._decodes_on_device = decoder == "cuda" and self.name != "numpy"  # which works on the host
        self._device = exact_device(device)
        self._config, self._threads, self._batch_size, self._table_bytes = config, threads, batch_size, table_bytes
        self._decoder = Decoder(
            height=height,
            width=width,
            fit=config.fit,
            background=config.behind,
            threads=threads,
            device_id=self._device.index if decoder == "cuda" else None,
            max_pixels=config.max_image_pixels,
        )
        self._backend: Backend | None = None

    def room(self, n: int) -> Store:
        """(n, H, W, 3) uint8: on the device where that decodes and the backend works there, so that no image goes to the host and back."""
        shape = (n, *self.row.shape)
        return torch.empty(shape, dtype=torch.uint8, device=self._device) if self._decodes_on_device else np.empty(shape, np.uint8)

    def decode(self, encoded: Sequence[Encoded], out: Store) -> Bad:
        """Decodes each image into its row of `out`, (n, H, W, 3) uint8; a bad one becomes zeros. Into a tensor on the current stream."""
        if isinstance(out, np.ndarray):
            return self._decoder.decode(encoded, out=out).bad
        images = out  # (n, H, W, 3)
        stream = torch.cuda.current_stream(out.device) if out.device.type == "cuda" else None

        def put(indices: list[int], made: Any) -> None:
            images.index_copy_(0, upload(np.array(indices), images.device), copied_from_dali(made, images.device, stream))

        bad = self._decoder.decode_there(encoded, put, stream)
        if bad:
            images.index_fill_(0, upload(np.array([index for index, _ in bad]), images.device), 0)
        return bad

    def batch(self, store: Store, rows: Ids, ids: Ids, *, seed: int, epoch: int | None) -> torch.Tensor:
        """(n, 3, H, W) uint8, channels_last by its strides: cropped and flipped, or unchanged if `epoch` is None."""
        if epoch is None:
            return gather(store, rows, self._device).permute(0, 3, 1, 2)
        if self._backend is None:
            self._backend = self._make_backend()
        drawn = augment.draw(seed=seed, epoch=epoch, ids=ids, pad=self._config.padding, flip=self._config.flip)
        return self._backend.batch(store, rows, drawn).permute(0, 3, 1, 2)

    def warm_up(self) -> None:
        self._decoder.warm_up()

    def close(self) -> None:
        self._decoder.close()

    def _make_backend(self) -> Backend:
        height, width, _ = self.row.shape
        return make_backend(
            self.name,
            height=height,
            width=width,
            pad=self._config.padding,
            batch_size=self._batch_size,
            device=self._device,
            threads=self._threads,
            table_bytes=self._table_bytes,
        )

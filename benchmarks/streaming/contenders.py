"""The contenders: each converts the images to its format once, and yields an epoch of batches, from its start or from a state.

Called by `child.py`, in a fresh process for each measurement. All process an image in the same way: decode it to RGB, resize it so that its
shorter side is `size` pixels (bilinear with antialiasing, by each decoder's library), crop the centre, mirror it with probability one half,
and return it as uint8, channels last. So the decoder sets the cost of an image, and the loader decides which image comes when. `load`
imports a contender's own libraries, so that this can be timed separately.

The peers' decoders (`Decode`) do not use torchvision's transform objects, which would only slow them down.
"""

import importlib
import io
import multiprocessing
import os
import random
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from benchmarks.streaming.pictures import Images

SHARDS = 10
"""For formats that count their shards: more than the workers that share them, and 50 MB each at 10,000 photographs."""
SHARD_BYTES = 64 << 20
"""For formats that count shards in bytes: the default of mosaicml-streaming, and ours."""

DECODING = multiprocessing.get_context("fork").RawValue("b", 1)
"""Off if only the order of the images counts: then the peers' forked workers return black images. Ours always decodes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What to read, and how."""

    folder: Path
    """Folder in the contender's format; the ImageFolder itself if it has no format of its own."""
    size: int
    batch_size: int
    workers: int
    """Worker processes of a DataLoader, or our decoding threads."""
    decoder: str
    seed: int
    window: int
    """Images shuffled together, for contenders that shuffle by a window or a buffer."""
    memory_bytes: int
    """Limit for our encoded row groups; the peers have no such limit."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Got:
    """A batch as a training loop receives it."""

    images: Tensor  # (n, 3, size, size) uint8 channels_last; black if nothing was decoded
    labels: Tensor  # (n,)
    ids: Any  # (n,) the contender's own names for the images; `Contender.image_ids` translates them


class Contender:
    """One loader. `load` imports, `batches` begins an epoch, `state` returns its position; each is used once in a process."""

    format: ClassVar[str] = ""
    """Name of its format's folder; contenders may share one. Empty: the contender reads the ImageFolder."""
    package: ClassVar[str] = ""
    """The package that must be installed."""
    decoders: ClassVar[tuple[str, ...]] = ("torchvision", "pil")
    resumes_by: ClassVar[str] = "its state"
    always_decodes: ClassVar[bool] = False

    @staticmethod
    def convert(images: Images, dest: Path) -> None:
        """Creates `dest`, which does not exist yet."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def load(self) -> None:
        """Imports what `batches` needs."""

    def batches(self, state: Any = None) -> Iterator[Got]:
        """Yields the first epoch, or the rest of it."""
        raise NotImplementedError

    def state(self, done: int) -> Any:
        """The state from which to continue after `done` batches; can be pickled."""
        raise NotImplementedError

    def image_ids(self, ids: list[Any], images: Images) -> np.ndarray:
        """Translates the contender's `Got.ids` into ids of the images."""
        return np.array(ids, dtype=np.int64)

    def close(self) -> None:
        """Cleans up before the process ends."""


class Decode:
    """JPEG bytes -> (size, size, 3) uint8, mirrored or not. Runs in the workers."""

    def __init__(self, size: int, decoder: str, *, flip: bool = True) -> None:
        assert decoder in ("pil", "torchvision"), decoder
        self._size, self._decoder, self._flip = size, decoder, flip

    def __call__(self, data: bytes) -> Tensor:
        if not DECODING.value:
            return torch.zeros((self._size, self._size, 3), dtype=torch.uint8)
        mirrored = self._flip and random.random() < 0.5
        return self._by_pil(data, mirrored) if self._decoder == "pil" else self._by_torchvision(data, mirrored)

    def _by_pil(self, data: bytes, mirrored: bool) -> Tensor:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        width, height = self._scaled(*image.size)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = self._middle(width), self._middle(height)
        if (width, height) != (self._size, self._size):
            image = image.crop((left, top, left + self._size, top + self._size))
        if mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image))

    def _by_torchvision(self, data: bytes, mirrored: bool) -> Tensor:
        from torchvision.io import ImageReadMode, decode_jpeg

        # A copy, because torch wants a writable buffer; (3, H, W) by its shape, (H, W, 3) in memory.
        image = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        height, width = image.shape[1:]
        new_width, new_height = self._scaled(width, height)
        if (new_width, new_height) != (width, height):
            # uint8 throughout, for torch's vectorised kernel. With image[None] torch does not recognise channels_last and returns the
            # channels apart: 320 us a photograph including the copy to join them; this way takes 185.
            batch = image.permute(1, 2, 0).unsqueeze(0).permute(0, 3, 1, 2)
            image = F.interpolate(batch, size=(new_height, new_width), mode="bilinear", antialias=True, align_corners=False)[0]
        left, top = self._middle(new_width), self._middle(new_height)
        image = image[:, top : top + self._size, left : left + self._size]
        return (image.flip(2) if mirrored else image).permute(1, 2, 0).contiguous()

    def _scaled(self, width: int, height: int) -> tuple[int, int]:
        shorter = min(width, height)
        return width * self._size // shorter, height * self._size // shorter

    def _middle(self, side: int) -> int:
        return round((side - self._size) / 2)  # like torchvision's CenterCrop


class Positions(Sampler[int]):
    """A seeded permutation of 0..count-1 from position `start` on: an exact way to resume a map-style data set."""

    def __init__(self, count: int, seed: int, start: int) -> None:
        self._ids = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[start:].tolist()

    def __iter__(self) -> Iterator[int]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)


def got(batch: Any) -> Got:
    """From the output of torch's default collate for (image, label, id)."""
    images, labels, ids = batch
    return Got(images=images.permute(0, 3, 1, 2), labels=labels, ids=ids)


class ImageFolder(Contender):
    """torchvision's ImageFolder and torch's DataLoader, resumed by a sampler written for it here."""

    package = "torchvision"
    resumes_by = "a sampler of ours"

    def load(self) -> None:
        import torchvision.datasets  # noqa: F401

    def batches(self, state: Any = None) -> Iterator[Got]:
        from torchvision.datasets import ImageFolder as Folder

        class Numbered(Folder):
            def __getitem__(self, index: int) -> tuple[Any, int, int]:
                return *super().__getitem__(index), index

        task = self.task
        dataset = Numbered(
            str(task.folder / "train"), transform=Decode(task.size, task.decoder), loader=lambda path: Path(path).read_bytes()
        )
        sampler = Positions(len(dataset), task.seed, state or 0)
        yield from map(got, DataLoader(dataset, batch_size=task.batch_size, sampler=sampler, **workers_of(task)))

    def state(self, done: int) -> Any:
        return done * self.task.batch_size


def workers_of(task: Task) -> dict[str, Any]:
    return {"num_workers": task.workers, "multiprocessing_context": "fork"} if task.workers else {"num_workers": 0}


class WebDataset(Contender):
    """tar shards. It has no state: a resume reads everything again and drops what was seen, undecoded."""

    format = package = "webdataset"
    resumes_by = "reading again"

    @staticmethod
    def convert(images: Images, dest: Path) -> None:
        import webdataset

        dest.mkdir()
        labels = images.labels()
        with webdataset.ShardWriter(str(dest / "train-%06d.tar"), maxcount=-(-len(images.paths) // SHARDS), verbose=0) as writer:
            for image_id in shuffled(images):
                writer.write({"__key__": f"{image_id:09d}", "jpg": images.read(image_id), "cls": str(labels[image_id])})

    def load(self) -> None:
        import webdataset  # noqa: F401

    def batches(self, state: Any = None) -> Iterator[Got]:
        import webdataset

        task = self.task
        decode = Decode(task.size, task.decoder)
        shards = sorted(str(path) for path in task.folder.glob("*.tar"))
        dataset = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=task.seed, empty_check=False)
        dataset = dataset.shuffle(task.window, seed=task.seed)
        if state:
            # The workers' batches alternate: each worker has returned the same number.
            workers = max(task.workers, 1)
            assert state % workers == 0, (state, workers)
            dataset = dataset.slice(state // workers * task.batch_size, None)
        dataset = dataset.map(lambda sample: (decode(sample["jpg"]), int(sample["cls"]), int(sample["__key__"])))
        dataset = dataset.batched(task.batch_size, collation_fn=torch.utils.data.default_collate)
        yield from map(got, webdataset.WebLoader(dataset, batch_size=None, **workers_of(task)))

    def state(self, done: int) -> Any:
        return done


class Mosaic(Contender):
    """mosaicml-streaming: MDS shards, StreamingDataset, StreamingDataLoader."""

    format = "mds"
    package = "mosaicml-streaming"

    @staticmethod
    def convert(images: Images, dest: Path) -> None:
        from streaming import MDSWriter

        labels = images.labels()
        columns = {"image": "bytes", "label": "int", "id": "int"}
        with MDSWriter(out=str(dest), columns=columns, size_limit=SHARD_BYTES) as writer:
            for image_id in shuffled(images):
                writer.write({"image": images.read(image_id), "label": int(labels[image_id]), "id": image_id})

    def load(self) -> None:
        import streaming  # noqa: F401

    def batches(self, state: Any = None) -> Iterator[Got]:
        from streaming import StreamingDataLoader, StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        task = self.task
        decode = Decode(task.size, task.decoder)

        class Decoded(StreamingDataset):
            def __getitem__(self, at: Any) -> Any:
                sample = super().__getitem__(at)
                return decode(sample["image"]), sample["label"], sample["id"]

        clean_stale_shared_memory()
        dataset = Decoded(local=str(task.folder), shuffle=True, shuffle_seed=task.seed, batch_size=task.batch_size)
        self._loader = StreamingDataLoader(dataset, batch_size=task.batch_size, **workers_of(task))
        if state:
            self._loader.load_state_dict(state)
        yield from map(got, self._loader)

    def state(self, done: int) -> Any:
        return self._loader.state_dict()


class LitData(Contender):
    """litdata: chunks, StreamingDataset, StreamingDataLoader."""

    format = package = "litdata"

    @staticmethod
    def convert(images: Images, dest: Path) -> None:
        import litdata

        labels = images.labels().tolist()
        litdata.optimize(
            fn=_LitSample(images, labels),
            inputs=shuffled(images),
            output_dir=str(dest),
            chunk_bytes=SHARD_BYTES,
            num_workers=1,
            verbose=False,
        )

    def load(self) -> None:
        import litdata  # noqa: F401

    def batches(self, state: Any = None) -> Iterator[Got]:
        from litdata import StreamingDataLoader, StreamingDataset

        task = self.task
        decode = Decode(task.size, task.decoder)

        class Decoded(StreamingDataset):
            def __getitem__(self, index: Any) -> Any:
                sample = super().__getitem__(index)
                return decode(sample["image"]), sample["label"], sample["id"]

        dataset = Decoded(str(task.folder), shuffle=True, drop_last=False, seed=task.seed)
        self._loader = StreamingDataLoader(dataset, batch_size=task.batch_size, **workers_of(task))
        if state:
            self._loader.load_state_dict(state)
        yield from map(got, self._loader)

    def state(self, done: int) -> Any:
        return self._loader.state_dict()


class _LitSample:
    def __init__(self, images: Images, labels: list[int]) -> None:
        self._images, self._labels = images, labels

    def __call__(self, image_id: int) -> dict[str, Any]:
        return {"image": self._images.read(image_id), "label": self._labels[image_id], "id": image_id}


class _HuggingFace(Contender):
    """The format that both ways of reading share."""

    format = "hf"
    package = "datasets"

    @staticmethod
    def convert(images: Images, dest: Path) -> None:
        import datasets

        labels = images.labels()
        features = datasets.Features({"image": datasets.Value("binary"), "label": datasets.Value("int64"), "id": datasets.Value("int64")})

        def rows() -> Iterator[dict[str, Any]]:
            for image_id in shuffled(images):
                yield {"image": images.read(image_id), "label": int(labels[image_id]), "id": image_id}

        cache = dest.with_name(dest.name + ".cache")
        made = datasets.Dataset.from_generator(rows, features=features, cache_dir=str(cache))
        made.save_to_disk(str(dest), num_shards=SHARDS)
        shutil.rmtree(cache)

    def load(self) -> None:
        import datasets  # noqa: F401


class HuggingFaceMap(_HuggingFace):
    """HF datasets, memory-mapped Arrow with random access, resumed by ImageFolder's sampler."""

    resumes_by = "a sampler of ours"

    def batches(self, state: Any = None) -> Iterator[Got]:
        import datasets

        task = self.task
        decode = Decode(task.size, task.decoder)

        def transform(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
            return {"image": [decode(data) for data in rows["image"]], "label": rows["label"], "id": rows["id"]}

        dataset = datasets.load_from_disk(str(task.folder)).with_transform(transform)
        sampler = Positions(len(dataset), task.seed, state or 0)
        for batch in DataLoader(dataset, batch_size=task.batch_size, sampler=sampler, **workers_of(task)):
            yield got((batch["image"], batch["label"], batch["id"]))

    def state(self, done: int) -> Any:
        return done * self.task.batch_size


class HuggingFaceStream(_HuggingFace):
    """HF datasets, iterable, shuffled by shards and a buffer; torchdata's StatefulDataLoader keeps its state, as in HF's manual."""

    def load(self) -> None:
        import datasets
        import torchdata.stateful_dataloader  # noqa: F401

        del datasets

    def batches(self, state: Any = None) -> Iterator[Got]:
        import datasets
        from torchdata.stateful_dataloader import StatefulDataLoader

        task = self.task
        decode = Decode(task.size, task.decoder)

        def transform(row: dict[str, Any]) -> dict[str, Any]:
            return {"image": decode(row["image"]), "label": row["label"], "id": row["id"]}

        stored = datasets.load_from_disk(str(task.folder))
        dataset = stored.to_iterable_dataset(num_shards=SHARDS)
        # By default the buffer draws from ten shards at once, so a data set of fewer than twenty has work for only one worker
        # (huggingface/datasets issue 8669).
        inputs = SHARDS // max(task.workers, 1)
        dataset = dataset.shuffle(seed=task.seed, buffer_size=task.window, max_buffer_input_shards=inputs).map(transform)
        self._loader = StatefulDataLoader(dataset, batch_size=task.batch_size, **workers_of(task))
        if state:
            self._loader.load_state_dict(state)
        for batch in self._loader:
            yield got((batch["image"], batch["label"], batch["id"]))

    def state(self, done: int) -> Any:
        return self._loader.state_dict()


class Ours(Contender):
    """dataio: Parquet shards, `data.cache=none`, a windowed shuffle. Decodes with DALI; to separate loader and decoder, like the peers."""

    format = "dataio"
    package = "nvidia-dali-cuda130"
    decoders = ("dali", "pil", "torchvision")
    resumes_by = "step number"
    always_decodes = True

    @staticmethod
    def convert(images: Images, dest: Path) -> None:
        from dataio.config import DataConfig
        from dataio.conversion import convert

        convert(_Shuffled(images), dest, max_bad_fraction=0.0, max_image_pixels=DataConfig().max_image_pixels)

    def load(self) -> None:
        import nvidia.dali.fn
        import nvidia.dali.types  # noqa: F401

        import dataio.codecs.image.codec
        import dataio.loader
        import dataio.parquet

        if self.task.decoder != "dali":
            # The codec looks this name up in its module; `batches` checks that this decoder was really used.
            self._peers = peers_decoder(self.task.decoder)
            dataio.codecs.image.codec.Decoder = self._peers  # type: ignore[misc]

    def batches(self, state: Any = None) -> Iterator[Got]:
        from dataio.config import DataConfig
        from dataio.loader import Loader
        from dataio.order import Order
        from dataio.parquet import open_dataset

        task = self.task
        dataset = open_dataset(task.folder)
        self._split = dataset.split("train")
        config = DataConfig(
            path=str(task.folder),
            cache="none",
            image_size=task.size,
            fit="crop",
            pad=0,
            batch_size=task.batch_size,
            shuffle_window=task.window,
        )
        order = Order(
            seed=task.seed,
            fingerprint=dataset.manifest.fingerprint,
            count=self._split.count,
            batch_size=task.batch_size,
            virtual_ranks=1,
            window=task.window,
        )

        def refuse(bad: Any) -> None:
            raise ValueError(f"{bad.key} is bad: {bad.reason}")

        loader = Loader(
            dataset,
            config,
            order=order,
            virtual_ranks=range(1),
            device=torch.device("cpu"),
            seed=task.seed,
            threads=max(task.workers, 1),
            on_bad=refuse,
            memory_bytes=task.memory_bytes,
        )
        for (batch,) in loader.train(state or 0, order.steps_per_epoch):
            if task.decoder != "dali" and not self._peers.decoded:
                raise RuntimeError("the images' codec no longer makes its decoder by the name Decoder; put the peers' where it does")
            yield Got(images=batch.samples, labels=batch.targets["label"], ids=batch.ids)

    def state(self, done: int) -> Any:
        return done

    def image_ids(self, ids: list[Any], images: Images) -> np.ndarray:
        numbers = {path: number for number, path in enumerate(images.paths)}
        return np.array([numbers[key] for key in self._split.keys(np.array(ids, dtype=np.int64))], dtype=np.int64)


class _Shuffled:
    """The images as a `dataio.sources.Source`, in the order that all other formats use."""

    kind = "folder"
    ignored = ()
    held_out: ClassVar = {}

    def __init__(self, images: Images) -> None:
        from dataio.schema import single_label

        self._images = images
        self.identity, self.classes = images.sha256, images.classes
        self.identities, self.targets = (self.identity,), single_label(images.classes)
        self._train = [images.paths[image_id] for image_id in shuffled(images)]
        self._test = sorted(path.relative_to(images.folder).as_posix() for path in (images.folder / "test").glob("*/*.jpg"))

    def splits(self) -> tuple[str, ...]:
        return ("train", "test")

    def count(self, split: str) -> int | None:
        return len(self._paths(split))

    def samples(self, split: str, start: int = 0) -> Iterator[Any]:
        from dataio.sources import Sample

        for path in self._paths(split)[start:]:
            yield Sample(key=path, data=(self._images.folder / path).read_bytes(), values=(self.classes.index(path.split("/")[1]),))

    def _paths(self, split: str) -> list[str]:
        return self._train if split == "train" else self._test


def peers_decoder(by: str) -> Any:
    """A class that replaces `dataio.codecs.image.decode.Decoder` and decodes like the peers, with as many threads. Made in a function,
    because peers do not import dataio."""
    from dataio.codecs.image.decode import Decoded, Decoder

    class PeersDecoder(Decoder):
        decoded = 0

        def __init__(self, *, height: int, width: int, threads: int = 1, **more: Any) -> None:
            super().__init__(height=height, width=width, threads=threads, **more)
            assert height == width, (height, width)
            self._by_peers = Decode(height, by, flip=False)  # the loader's backend flips
            self._pool = ThreadPoolExecutor(threads)

        def warm_up(self) -> None:
            """Does nothing: there is nothing to build."""

        def decode(self, encoded: Any, out: Any = None) -> Any:
            shape = (len(encoded), self.height, self.width, 3)
            images = np.empty(shape, np.uint8) if out is None else out[: len(encoded)]

            def one(index: int) -> None:
                images[index] = self._by_peers(bytes(encoded[index])).numpy()

            list(self._pool.map(one, range(len(encoded))))
            PeersDecoder.decoded += len(encoded)
            return Decoded(images=images, bad=())

    return PeersDecoder


CONTENDERS: dict[str, type[Contender]] = {
    "ours": Ours,
    "imagefolder": ImageFolder,
    "webdataset": WebDataset,
    "mosaicml-streaming": Mosaic,
    "litdata": LitData,
    "hf-map": HuggingFaceMap,
    "hf-iterable": HuggingFaceStream,
}


def contender_of(name: str) -> tuple[type[Contender], str]:
    """`loader+decoder`, or `module:Class+decoder` for a loader that is not in the table."""
    loader, _, decoder = name.partition("+")
    if ":" in loader:
        module, _, attribute = loader.partition(":")
        kind: type[Contender] = getattr(importlib.import_module(module), attribute)
    elif loader in CONTENDERS:
        kind = CONTENDERS[loader]
    else:
        raise ValueError(f"there is no contender {loader!r}; there are {', '.join(CONTENDERS)}, or module:Class for one of your own")
    decoder = decoder or kind.decoders[0]
    if decoder not in kind.decoders:
        raise ValueError(f"{loader} does not decode by {decoder!r}; say {loader}+{{{','.join(kind.decoders)}}}")
    return kind, decoder


def shuffled(images: Images) -> list[int]:
    """The order in which formats are written, so that a contender with a local shuffle does not see one class after the other."""
    return np.random.default_rng(0).permutation(len(images.paths)).tolist()


def disk_bytes(folder: Path) -> int:
    """Disk space of its files, in whole blocks."""
    return sum(os.stat(path).st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def environment(scratch: Path) -> dict[str, str]:
    """Environment of every measured process: one thread, no network access, caches in the scratch folder."""
    return {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(scratch / "hf-home"),
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "LITDATA_DISABLE_VERSION_CHECK": "1",
        "DATA_OPTIMIZER_CACHE_FOLDER": str(scratch / "litdata-cache"),
        "DATA_OPTIMIZER_DATA_CACHE_FOLDER": str(scratch / "litdata-data"),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }

"""On a GPU: the three backends make the reference's batches, and a loader gives the bits that it gives on a CPU, wherever images stay."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from dataio.codecs.codec import Store
from dataio.codecs.device import gather
from dataio.codecs.image.augment import draw, reference
from dataio.codecs.image.backends import _Torch, make_backend
from dataio.config import DataConfig
from dataio.loader import Loader, steps_a_block
from dataio.order import Order
from dataio.parquet import open_dataset
from dataio.quarantine import BadSample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False here"),
]

HEIGHT, WIDTH, STORED = 12, 10, 50
SAMPLE = Path(__file__).parents[2] / "dataio" / "samples" / "fashion_mnist"


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (STORED, HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.mark.parametrize("pad", [0, 4, 13])
@pytest.mark.parametrize(
    ("name", "cache"), [("torch", "device"), ("dali", "device"), ("torch", "host"), ("dali", "host"), ("numpy", "host")]
)
def test_a_batch_on_the_gpu_equals_the_integer_reference(images: np.ndarray, name: str, cache: str, pad: int) -> None:
    device = torch.device("cuda")
    made = make_backend(name, height=HEIGHT, width=WIDTH, pad=pad, batch_size=16, device=device)
    held: Store = torch.from_numpy(images).to(device) if cache == "device" else images
    kept = []
    for epoch, n in enumerate([16, 1, 0, 7, 16, 40]):
        rows = np.random.default_rng(epoch).integers(0, STORED, n)
        drawn = draw(seed=5, epoch=epoch, ids=rows, pad=pad, flip=True)
        kept.append((made.batch(held, rows, drawn), reference(images[rows], drawn, pad)))
    for batch, expected in kept:
        assert batch.device.type == "cuda"
        assert batch.dtype == torch.uint8
        assert batch.is_contiguous()
        assert np.array_equal(batch.cpu().numpy(), expected)


@pytest.mark.parametrize(("height", "width", "pad"), [(32, 32, 4), (1, 1, 1), (5, 7, 9), (224, 224, 0), (97, 131, 8)])
def test_the_kernel_and_torchs_operations_make_the_same_bytes(height: int, width: int, pad: int) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    kernel, operations = (make_backend("torch", height=height, width=width, pad=pad, batch_size=64, device=device) for _ in range(2))
    assert isinstance(kernel, _Torch)
    assert isinstance(operations, _Torch)
    assert kernel._kernel is not None  # Triton could compile it
    operations._kernel = None
    held = torch.randint(0, 256, (STORED, height, width, 3), dtype=torch.uint8, device=device)
    for epoch, n in enumerate([64, 1, 0, 7, 300]):
        rows = np.random.default_rng(epoch).integers(0, STORED, n)
        drawn = draw(seed=5, epoch=epoch, ids=rows * 3, pad=pad, flip=True)
        made = kernel.batch(held, rows, drawn)
        assert made.is_contiguous()
        assert torch.equal(made, operations.batch(held, rows, drawn))
        if height <= 32:
            assert np.array_equal(made.cpu().numpy(), reference(held.cpu().numpy()[rows], drawn, pad))


@pytest.mark.parametrize("name", ["torch", "dali", "numpy"])
def test_a_backend_works_on_the_stream_it_is_called_on(images: np.ndarray, name: str) -> None:
    device = torch.device("cuda")
    made = make_backend(name, height=HEIGHT, width=WIDTH, pad=2, batch_size=32, device=device)
    stream = torch.cuda.Stream()
    rows = np.arange(32)
    drawn = draw(seed=5, epoch=0, ids=rows, pad=2, flip=True)
    for _ in range(20):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(2_000_000)  # what follows on this stream is late; on any other it would be early
            held: Store = (
                images if name == "numpy" else gather(images, np.arange(STORED), torch.device("cuda", torch.cuda.current_device()))
            )
            batch = made.batch(held, rows, drawn)
            on_host = batch.cpu()
        assert np.array_equal(on_host.numpy(), reference(images[rows], drawn, 2))


@pytest.mark.parametrize("name", ["torch", "numpy"])
def test_making_a_batch_does_not_synchronise_the_device(images: np.ndarray, name: str) -> None:
    device = torch.device("cuda")
    made = make_backend(name, height=HEIGHT, width=WIDTH, pad=2, batch_size=32, device=device)
    held: Store = images if name == "numpy" else torch.from_numpy(images).to(device)
    rows = np.arange(32)
    drawn = draw(seed=5, epoch=0, ids=rows, pad=2, flip=True)
    made.batch(held, rows, drawn)
    torch.cuda.set_sync_debug_mode("error")
    try:
        made.batch(held, rows, drawn)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_is_captured_while_dali_makes_and_frees_batches(images: np.ndarray) -> None:
    """A free that synchronised the device, in any thread, would break the capture."""
    device = torch.device("cuda", torch.cuda.current_device())
    made = make_backend("dali", height=HEIGHT, width=WIDTH, pad=2, batch_size=32, device=device)
    held, rows = torch.from_numpy(images).to(device), np.arange(32)
    drawn = draw(seed=5, epoch=0, ids=rows, pad=2, flip=True)
    wanted = reference(images[rows], drawn, 2)
    made.batch(held, rows, drawn)  # builds the pipeline
    side, stop, wrong = torch.cuda.Stream(), threading.Event(), []

    def work() -> None:
        with torch.cuda.stream(side):
            while not stop.is_set():
                if not np.array_equal(made.batch(held, rows, drawn).cpu().numpy(), wanted):
                    wrong.append("another batch")

    numbers = torch.ones(1 << 20, device=device)
    result = torch.empty_like(numbers)
    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(20):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                result.copy_(numbers * 2)
            graph.replay()
    finally:
        stop.set()
        thread.join()
    assert not wrong
    assert bool((result == 2).all())


def no_bad_sample(bad: BadSample) -> None:
    raise AssertionError(bad)


@pytest.mark.parametrize(
    ("cache", "backend"), [("device", "torch"), ("device", "dali"), ("host", "numpy"), ("host", "dali"), ("none", "torch")]
)
def test_a_loader_on_the_gpu_gives_the_bits_it_gives_on_a_cpu(cache: str, backend: str) -> None:
    dataset = open_dataset(SAMPLE)
    count = dataset.split("train").count
    order = Order(seed=0, fingerprint=dataset.manifest.fingerprint, count=count, batch_size=128, virtual_ranks=2)

    def loader(device: str, cache: str, backend: str) -> Loader:
        config = DataConfig(cache=cache, backend=backend)  # type: ignore[arg-type]
        return Loader(dataset, config, order=order, virtual_ranks=range(2), device=torch.device(device), seed=0, on_bad=no_bad_sample)

    gpu, cpu = loader("cuda", cache, backend), loader("cpu", "host", "numpy")
    assert gpu.cache == cache
    step_bytes = 128 * gpu.row.nbytes
    assert gpu._steps_a_block == steps_a_block(cache, step_bytes)
    assert cache != "device" or gpu._steps_a_block > cpu._steps_a_block
    steps = order.steps_per_epoch + 3
    for on_gpu, on_cpu in zip(gpu.train(0, steps), cpu.train(0, steps), strict=True):
        for one, other in zip(on_gpu, on_cpu, strict=True):
            assert one.samples.device.type == one.targets["label"].device.type == "cuda"
            assert one.samples.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(one.samples.cpu(), other.samples)
            assert torch.equal(one.targets["label"].cpu(), other.targets["label"])
    for one, other in zip(gpu.evaluate("test", range(100), 32), cpu.evaluate("test", range(100), 32), strict=True):
        assert torch.equal(one.samples.cpu(), other.samples)

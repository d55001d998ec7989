"""A run whose images never stay in memory, read from S3 (moto's server, over HTTP), ends in the bits of one that holds them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.running import PROJECT, Run
from tests.s3 import SECRET, Server, serving

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
SAMPLES = PROJECT / "dataio" / "samples" / "fashion_mnist"
COMMON = [
    *("--workers", "2", "--train.max-steps", "100", "--train.checkpoint-every", "10", "--train.eval-every-epochs", "10"),
    *("--data.shuffle-window", "1024", "--data.batch-size", "40"),
]


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """What a process needs to find s3://bucket/fashion, a copy of the sample."""
    with serving(Server()) as server:
        client = server.client()
        client.create_bucket(Bucket="bucket")
        for file in SAMPLES.iterdir():
            if file.suffix in (".parquet", ".json"):
                client.upload_file(str(file), "bucket", f"fashion/{file.name}")
        yield server.environment


def test_streamed_from_s3_and_killed_in_the_middle_the_weights_are_those_of_images_in_memory(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    held = Run(*COMMON, "--data.cache", "host", storage=tmp_path, name="held", data=SAMPLES)
    assert held.finish() == 0, held.output()

    streamed = Run(
        *(*COMMON, "--data.cache", "none", "--data.path", "s3://bucket/fashion"),
        storage=tmp_path,
        name="streamed",
        data=SAMPLES,  # the later --data.path counts
        environment=environment,
    )
    streamed.wait_for("checkpoint_committed", step=30)
    streamed.kill_worker(rank=1)
    assert streamed.finish() == 0, streamed.output()
    assert streamed.wait_for("training_started")["cache"] == "none"
    assert streamed.summary()["restarts"] == 1
    assert streamed.summary()["weights_sha256"] == held.summary()["weights_sha256"]
    assert SECRET not in streamed.output() + (streamed.folder / "journal.jsonl").read_text()

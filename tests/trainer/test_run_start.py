"""What trainer.run says before any cluster is started: a user's mistake costs seconds, names the fix, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from cluster.storage import open_storage
from cluster.zygote import Zygote
from trainer.drive.check import ModelCheck
from trainer.run import PROJECT, check_before_cluster, described, dry_run, main, open_data, resolved
from trainer.settings.spec import RANK_MODULES
from trainer.settings.tree import RunConfig

SMALL = ["--model.name", "shufflenet_v2_x0_5", "--model.weights", "none", "--cluster.threads-per-worker", "1"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty images of two classes, all 40x40, two of them broken."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(60):
        folder = root / ("cat", "dog")[number % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")
    (root / "cat" / "00.png").write_bytes(b"")
    (root / "dog" / "01.png").write_bytes(b"<html>404</html>")
    return root


@pytest.fixture
def config(photos: Path, tmp_path: Path) -> RunConfig:
    plain = RunConfig(storage=str(tmp_path / "runs"))
    return replace(
        plain,
        data=replace(plain.data, path=str(photos), root=str(tmp_path / "root"), batch_size=4, max_bad_fraction=0.1),
        model=replace(plain.model, name="shufflenet_v2_x0_5", weights="none"),
    )


def no_ray(*_: object, **__: object) -> None:
    raise AssertionError("a cluster was started")


def test_an_unconverted_folder_is_converted_in_words_and_what_is_left_out_is_said_each_time(config: RunConfig) -> None:
    console = Console(width=160, record=True, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115
    folder, dataset = open_data(config, console)
    said = console.export_text()
    assert f"converting {config.data.path}: train: " in said
    assert f"converted into {folder}\n" in said
    assert f"2 images that could not be used are left out: {folder}/quarantine.jsonl\n" in said
    assert "Progress(" not in said
    assert dataset.manifest.quarantined == 2
    open_data(config, console)
    again = console.export_text()
    assert "converting" not in again
    assert "converted into" not in again
    assert "2 images that could not be used are left out" in again


def test_what_would_fail_on_the_workers_is_found_before_a_cluster_is_started(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, dataset = open_data(config, Console(quiet=True))

    def check(changed: RunConfig) -> None:
        ready = resolved(changed, workers=1, fingerprint=dataset.manifest.fingerprint, recipe="pets", image_size=(40, 40))
        check_before_cluster(ready, open_storage(ready.storage), dataset)

    check(config)
    with pytest.raises(ValueError, match=r"--resume must, but run 'pets-.*' .* has no checkpoint; give --run NAME"):
        check(replace(config, resume="must"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file' cannot be made \(.*\); give a folder that can with --storage"):
        check(replace(config, storage=str(tmp_path / "file")))
    assert list((tmp_path / "runs").iterdir()) == []  # no run's folder was made for nothing


def test_the_model_is_built_once_in_another_process_and_what_is_wrong_with_it_comes_back(config: RunConfig, tmp_path: Path) -> None:
    zygote = Zygote(RANK_MODULES)
    try:

        def check(**fields: str) -> None:
            ModelCheck(zygote, replace(config.model, **fields), classes=2, seed=0, image_size=(40, 40)).wait()  # type: ignore[arg-type]

        check()
        with pytest.raises(ValueError, match="did you mean resnet18"):
            check(name="resnet81")
        with pytest.raises(ValueError, match=r"no such file; weights are imagenet, none, package:"):
            check(weights="/nowhere.pth")
        check()
        under_way = ModelCheck(zygote, config.model, classes=2, seed=0, image_size=(40, 40))
        zygote.close(kill=True)
        with pytest.raises(RuntimeError, match="ended with status"):
            under_way.wait()
    finally:
        zygote.close(kill=True)


def test_the_driver_never_imports_torch() -> None:
    modules = "trainer.run, trainer.drive.drive, cluster.launch, cluster.preflight"
    script = f"import sys, {modules}; sys.exit(sum(name in sys.modules for name in ('torch', 'matplotlib', 'nvidia.dali')))"
    assert subprocess.run([sys.executable, "-c", script], cwd=PROJECT, timeout=120).returncode == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model.name", "resnet81"], "did you mean resnet18"),
        (["--model.weights", "/nowhere.pth"], "no such file"),
        (["--resume", "must"], "--resume must"),
        (["--storage", "/proc/none"], "give a folder that can with --storage"),
        (["--data.root", "/proc/none"], "--data.root"),
        (["--data.path", "/nowhere"], "does not exist"),
        (["--data.max-bad-fraction", "0"], "--data.max-bad-fraction"),
        (["--cluster.metrics-host", "203.0.113.1"], "choose another cluster.metrics_host"),
        (["--cluster.gpus-per-worker", "99"], "--cluster.gpus-per-worker 0"),
    ],
)
def test_a_users_mistake_ends_with_status_2_one_message_and_no_cluster(
    config: RunConfig, flags: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.init", no_ray)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the handlers are the process's, which is pytest
    data = ["--data.path", config.data.path, "--data.root", config.data.root, "--data.max-bad-fraction", "0.1"]
    with pytest.raises(SystemExit) as stop:
        main([*SMALL, "--storage", config.storage, *data, *flags])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert words in said


def test_a_dry_run_of_data_that_are_not_there_says_so(config: RunConfig) -> None:
    missing = replace(config, data=replace(config.data, path="/nowhere"))
    with pytest.raises(ValueError, match="'/nowhere' does not exist"):
        dry_run(missing, (), Console(quiet=True))


def test_a_dry_run_names_the_folder_that_the_run_will_have(config: RunConfig) -> None:
    folder, dataset = open_data(config, Console(quiet=True))
    ready = replace(config, data=replace(config.data, path=str(folder)))
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    assert dry_run(ready, (), console) == 0
    name = resolved(ready, workers=1, fingerprint=dataset.manifest.fingerprint, recipe="shufflenet_v2_x0_5", image_size=(40, 40)).run
    assert f"{config.storage}/{name} " in console.export_text()


def test_a_full_disk_while_converting_is_no_traceback(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dataio.parquet.ShardWriter.write_group", full)
    monkeypatch.setattr("dataio.convert.ShardWriter.write_group", full)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    data = ["--data.path", config.data.path, "--data.root", config.data.root, "--data.max-bad-fraction", "0.1"]
    assert main([*SMALL, "--storage", config.storage, *data]) == 1
    said = capsys.readouterr().err
    assert "error: no space is left for" in said
    assert "make room" in said
    assert "Errno" not in said


def test_ctrl_c_during_the_imports_is_quiet() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer.run", "--config", "quickstart", "--dry-run"],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    maps = Path(f"/proc/{process.pid}/maps")
    while "libarrow" not in maps.read_text():  # in the middle of `import pyarrow`
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert "Traceback" not in output


def test_a_cluster_is_described_in_words() -> None:
    from cluster.launch import ClusterHardware

    assert described(2, ClusterHardware(local=True, nodes=1, cpus=8, gpus=0)) == "2 workers on 8 CPUs"
    assert described(1, ClusterHardware(local=True, nodes=1, cpus=16, gpus=1)) == "1 worker on 1 GPU and 16 CPUs"

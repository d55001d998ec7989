"""What a run's start says before any cluster is started: a user's mistake costs seconds, names the fix, and leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from cluster.store import Store
from cluster.zygote import Zygote
from dataio.schema import Target
from trainer.drive.check import Checked, ModelCheck, ModelCheckDied, Question
from trainer.drive.data import open_data
from trainer.drive.dry_run import dry_run
from trainer.drive.record import identity_of
from trainer.drive.set_up import SetUp
from trainer.drive.signals import Signals
from trainer.drive.stages import Asked, Environment, Placed, WithData
from trainer.drive.start import (
    PROJECT,
    check_folder,
    described,
    look_first,
    place,
    show_finished,
    unusual,
    with_data,
    workers_known,
)
from trainer.run import main
from trainer.settings.spec import RANK_MODULES
from trainer.settings.toml import to_toml
from trainer.settings.tree import RunConfig, TaskConfig
from trainer.tasks.info import CLASSIFICATION

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


QUIET = Console(quiet=True)


def asked(config: RunConfig, **environment: Any) -> Asked:
    known = Environment(ray_address="", in_job=False, is_verbose=False, cpus=2, process_started=0.0)
    return Asked(config=config, prefix="pets", command="", environment=replace(known, **environment))


def of(config: RunConfig) -> WithData:
    return with_data(asked(config), QUIET, SetUp(QUIET))


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


def test_what_would_fail_on_the_workers_is_found_before_a_cluster_is_started(config: RunConfig, tmp_path: Path) -> None:
    def check(changed: RunConfig) -> None:
        check_folder(place(of(changed), 1))

    check(config)
    with pytest.raises(ValueError, match=r"--resume must, but run 'pets-.*' .* has no checkpoint; give --run NAME"):
        check(replace(config, resume="must"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file' cannot be made \(.*\); give a folder that can with --storage"):
        check(replace(config, storage=str(tmp_path / "file")))
    assert list((tmp_path / "runs").iterdir()) == []  # no run's folder was made for nothing


def test_a_run_that_has_finished_is_found_by_its_name_and_its_settings(config: RunConfig) -> None:
    named = replace(config, run="mine")
    first = place(of(named), 1)
    assert not first.found.has_finished
    assert not first.is_outdated(1)
    assert first.is_outdated(2)
    storage, fingerprint = first.data.storage, first.data.fingerprint
    storage.write_atomic("mine/config.toml", to_toml(first.config).encode())
    assert first.is_outdated(1)  # another process has started it meanwhile
    begun = place(of(named), 1)
    assert not begun.is_outdated(1)
    assert not begun.found.has_finished
    storage.write_atomic("mine/summary.json", json.dumps({"status": "finished", "dataset_fingerprint": fingerprint}).encode())
    assert begun.is_outdated(1)
    done = place(of(named), 1)
    assert done.found.has_finished
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    assert show_finished(done, console, Signals()) == 0
    assert "run mine has finished already; --run NAME starts another" in console.export_text()
    with pytest.raises(ValueError, match=r"'mine' was started with other settings \(optim.lr: .*--run NAME"):
        place(of(replace(named, optim=replace(named.optim, lr=9.0))), 1)
    with pytest.raises(ValueError, match=r"--resume never, but run 'mine' in .* has finished"):
        show_finished(place(of(replace(named, resume="never")), 1), QUIET, Signals())


def test_another_weights_file_of_the_same_name_is_another_run_and_does_not_go_on_with_this_one(config: RunConfig, tmp_path: Path) -> None:
    def placed(content: bytes, run: str = "") -> Placed:
        (tmp_path / "model.safetensors").write_bytes(content)
        weights = str(tmp_path / "model.safetensors")
        return place(of(replace(config, run=run, model=replace(config.model, weights=weights))), 1)

    first = placed(b"a")
    storage, run = first.data.storage, first.config.run
    storage.write_atomic(f"{run}/config.toml", to_toml(first.config).encode())
    known = identity_of(first.config, first.data.dataset.manifest, weights=first.data.weights, device="cpu", threads=1)
    Store.open(storage, run).claim_generation({"identity": known.record()})
    storage.write_atomic(f"{run}/summary.json", json.dumps({"status": "finished", "dataset_fingerprint": first.data.fingerprint}).encode())
    again, other = placed(b"a"), placed(b"b")
    assert (again.config.run, again.found.has_finished) == (run, True)
    assert other.config.run != run
    assert not other.found.has_finished
    with pytest.raises(ValueError, match=r"model\.weights: 'sha256:ca978112ca1b' then, 'sha256:3e23e8160039' now"):
        placed(b"b", run=run)


def test_how_many_workers_there_may_be_is_known_without_a_cluster_unless_that_has_to_say(config: RunConfig) -> None:
    def known(workers: str, address: str) -> int | None:
        return workers_known(asked(replace(config, workers=workers), ray_address=address))

    assert [known(workers, "somewhere:6379") for workers in ("auto", "3", "1:4")] == [None, 3, 4]
    assert [known(workers, "") for workers in ("2", "1:2")] == [2, 2]
    for address in ("", "somewhere:6379"):
        with pytest.raises(ValueError, match="workers=many is not a number of workers"):
            known("many", address)


def test_in_a_job_a_storage_that_goes_with_it_is_refused_before_anything_is_converted(config: RunConfig, tmp_path: Path) -> None:
    zygote = Zygote(RANK_MODULES)
    try:
        with pytest.raises(ValueError, match=r"--storage runs is relative"):
            look_first(asked(replace(config, storage="runs"), in_job=True), zygote, SetUp(QUIET))
    finally:
        zygote.close(kill=True)
    assert not (tmp_path / "root").exists()


def test_the_model_is_built_once_in_another_process_and_what_is_wrong_with_it_comes_back(config: RunConfig) -> None:
    question = Question(
        task=config.task,
        targets=(Target(name="label", kind="label", classes=("cat", "dog")),),
        label_smoothing=0.0,
        model=config.model,
        shape=(40, 40),
        seed=0,
    )
    zygote = Zygote(RANK_MODULES)
    try:

        def check(**fields: str) -> Checked:
            model = replace(config.model, **fields)  # type: ignore[arg-type]
            return ModelCheck(zygote, replace(question, model=model)).wait()

        checked = check()
        assert (checked.has_depthwise, checked.task) == (True, CLASSIFICATION)
        assert 1e6 < checked.weights_bytes < 20e6
        with pytest.raises(ValueError, match="did you mean resnet18"):
            check(name="resnet81")
        with pytest.raises(ValueError, match=r"no such file; weights are imagenet, none, package:"):
            check(weights="/nowhere.pth")
        assert not check(name="resnet18").has_depthwise
        with pytest.raises(ValueError, match=r"task\.name='classfication'; did you mean classification\?"):
            ModelCheck(zygote, replace(question, task=TaskConfig(name="classfication"))).wait()
        under_way = ModelCheck(zygote, question)
        zygote.close(kill=True)
        with pytest.raises(ModelCheckDied, match=r"ended with status .* the same command again"):
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


def test_data_that_nothing_can_be_tested_on_are_refused_before_any_cluster(config: RunConfig) -> None:
    folder, dataset = open_data(config, QUIET)
    splits = {"train": dataset.manifest.splits["train"], "validation": dataset.manifest.splits["test"]}
    (Path(folder) / "manifest.json").write_text(replace(dataset.manifest, splits=splits).to_json())
    with pytest.raises(ValueError, match="has the splits train, validation, and a run is evaluated on test"):
        of(replace(config, data=replace(config.data, path=folder)))


def test_a_dry_run_of_data_that_are_not_there_says_so(config: RunConfig) -> None:
    missing = replace(config, data=replace(config.data, path="/nowhere"))
    with pytest.raises(ValueError, match="'/nowhere' does not exist"):
        dry_run(missing, (), QUIET)


def test_a_dry_run_names_the_folder_that_the_run_will_have(config: RunConfig) -> None:
    folder, _ = open_data(config, QUIET)
    ready = replace(config, data=replace(config.data, path=folder))
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    assert dry_run(ready, (), console) == 0
    name = place(of(ready), 1).config.run
    assert f"{config.storage}/{name.replace('pets', 'shufflenet_v2_x0_5')} " in console.export_text()


def test_a_full_disk_while_converting_is_no_traceback(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dataio.parquet.ShardWriter.write_group", full)
    monkeypatch.setattr("dataio.conversion.ShardWriter.write_group", full)
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


def test_a_folder_elsewhere_and_a_home_for_the_time_of_the_run_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    assert list(unusual("/tmp/finetune-ray-1-a")) == []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # of pytest, and as long as a batch job's
    monkeypatch.setenv("HOME", "/tmp/finetune-ray-1-a")
    elsewhere, home = unusual("/tmp/finetune-ray-1-a")
    assert elsewhere.startswith(f"{tmp_path} is too long (Ray's sockets below it may have 107 bytes")
    assert elsewhere.endswith("; Ray's files are in /tmp/finetune-ray-1-a")
    assert "set HOME or --data.root to keep them" in home


@pytest.mark.parametrize(
    ("number", "before"), [(signal.SIGINT, ""), (signal.SIGTERM, ""), (signal.SIGHUP, ""), (signal.SIGKILL, "trap '' HUP; kill -HUP $$; ")]
)
def test_a_signal_while_a_run_is_set_up_says_the_truth_and_leaves_nothing(config: RunConfig, number: signal.Signals, before: str) -> None:
    """The last one is under nohup, where the SIGHUP is ignored."""
    flags = [*SMALL, "--storage", config.storage, "--data.path", config.data.path, "--data.root", config.data.root]
    process = subprocess.Popen(
        ["sh", "-c", f'{before}exec "$@"', "sh", sys.executable, "-m", "trainer.run", *flags],
        cwd=PROJECT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not (folders := list(Path(tempfile.gettempdir()).glob(f"finetune-ray-{process.pid}-*"))):
        assert process.poll() is None
        time.sleep(0.005)
    if before:
        process.send_signal(signal.SIGHUP)
        time.sleep(0.1)
        assert process.poll() is None
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)  # the zygote and the reaper hold this end too
    if number == signal.SIGKILL:
        assert f"error: the driver (process {process.pid}) was killed; what it had started is ended, and the same command goes on" in said
    else:
        assert process.returncode == 128 + number
        assert said.splitlines()[-1] == f"{number.name}: stopped before training began; the same command starts again"
    assert "Traceback" not in said
    assert not folders[0].exists()


def test_a_cluster_is_described_in_words() -> None:
    from cluster.launch import ClusterHardware

    assert described(2, ClusterHardware(local=True, nodes=1, cpus=8, gpus=0)) == "2 workers on 8 CPUs"
    assert described(1, ClusterHardware(local=True, nodes=1, cpus=16, gpus=1)) == "1 worker on 1 GPU and 16 CPUs"

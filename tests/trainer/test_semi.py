"""Learning from images without labels: the rules against the papers' formulas, the running averages, and whole runs in this process."""

import dataclasses
import io
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from torch import Tensor

from cluster.reduce import tree_sum
from cluster.storage import open_storage
from dataio.batch import Batch
from dataio.codecs.image.codec import ImageCodec
from dataio.config import DataConfig
from dataio.prepared import prepared
from dataio.schema import UNLABELLED, single_label
from dataio.unlabelled import pin, prepare_unlabelled
from tests.trainer.lives import TINY, Killed, Lives, write_images
from trainer.drive.data import open_second, record_left_out
from trainer.drive.identity import identity
from trainer.drive.problems import problems_of
from trainer.drive.survey import survey
from trainer.learn import gradients, semi
from trainer.learn.build import Learner, SecondStream, build_learner, semi_of
from trainer.learn.semi import BAD_IMAGE, LABELS, RUNNING, SCALE, SUMS, Rule, averaged, judge, semi_loss, sums_of, told
from trainer.learn.state import StateError, TrainState
from trainer.settings.cli import parse
from trainer.settings.rules import validate
from trainer.settings.second_stream import order_of_unlabelled
from trainer.settings.tree import ModelConfig, RunConfig, TaskConfig, TrainConfig
from trainer.tasks.make import make_task

BATCHES = ("--data.batch-size", "12", "--train.virtual-ranks", "2", "--optim.lr", "0.1")
CLASSES = ("class-0", "class-1", "class-2")
METHODS = ("softmatch", "fixmatch", "freematch")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("photos"), {"train": 24, "test": 30})


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 images in class folders, one of which the run does not know."""
    folder = write_images(tmp_path_factory.mktemp("more"), {"all": 70}, noise=50.0) / "all"
    (folder / "class-2").rename(folder / "something else")
    return folder


def run_of(folder: Path, photos: Path, *flags: str) -> Lives:
    return pinned(Lives.of(folder, "--data.path", str(photos), *BATCHES, *TINY, *flags))


def pinned(lives: Lives) -> Lives:
    """With the images without labels as the driver finds them."""
    if lives.config.data.unlabelled:
        data = dataclasses.replace(lives.config.data, unlabelled=pin(prepare_unlabelled(lives.config.data)))
        lives.config = dataclasses.replace(lives.config, data=data)
    return lives


# --- the rules ----------------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Reference:
    """The papers' rules, image by image in Python's floats, with the same first values and the same decay."""

    method: str
    classes: int
    mean: float
    variance: float
    by_class: list[float]
    guessed: list[float]
    updates: int = 0

    @classmethod
    def first(cls, method: str, classes: int) -> "Reference":
        even = 1 / classes
        return cls(method=method, classes=classes, mean=even, variance=1.0, by_class=[even] * classes, guessed=[even] * classes)

    def judged(self, weak: list[list[float]]) -> list[tuple[int, float, float]]:
        """(guess, weight, confidence) of each image."""
        out = []
        for p in weak:
            guess = max(range(self.classes), key=lambda c: p[c])
            if self.method == "softmatch":
                aligned = [p[c] * (1 / self.classes + 1e-6) / (self.by_class[c] + 1e-6) for c in range(self.classes)]
                confidence = max(aligned) / sum(aligned)
                below = min(confidence - self.mean, 0.0)
                weight = math.exp(-(below**2) / (2 * self.variance / 4))
            elif self.method == "fixmatch":
                confidence, weight = p[guess], float(p[guess] >= 0.95)
            else:
                confidence = p[guess]
                weight = float(confidence >= self.mean * self.by_class[guess] / max(self.by_class))
            out.append((guess, weight, confidence))
        return out

    def fairness(self, judged: list[tuple[int, float, float]], strong: list[list[float]]) -> float:
        used = [p for (_, weight, _), p in zip(judged, strong, strict=True) if weight]
        if not used:
            return 0.0
        share = [sum(max(range(self.classes), key=lambda c, p=p: p[c]) == k for p in used) / len(used) for k in range(self.classes)]
        now = normed([sum(p[k] for p in used) / len(used) / share[k] if share[k] else 0.0 for k in range(self.classes)])
        before = normed([self.by_class[k] / self.guessed[k] if self.guessed[k] else 0.0 for k in range(self.classes)])
        return sum(b * math.log(n + 1e-12) for b, n in zip(before, now, strict=True))

    def update(self, judged: list[tuple[int, float, float]], weak: list[list[float]]) -> None:
        decay = min(0.999, (1 + self.updates) / (10 + self.updates))
        n = len(weak)
        confidences = [confidence for _, _, confidence in judged]
        mean = sum(confidences) / n
        if n > 1:
            self.variance = self.variance * decay + (1 - decay) * sum((c - mean) ** 2 for c in confidences) / (n - 1)
        self.mean = self.mean * decay + (1 - decay) * mean
        for k in range(self.classes):
            self.by_class[k] = self.by_class[k] * decay + (1 - decay) * sum(p[k] for p in weak) / n
            self.guessed[k] = self.guessed[k] * decay + (1 - decay) * sum(guess == k for guess, _, _ in judged) / n
        self.updates += 1


def normed(values: list[float]) -> list[float]:
    return [value / sum(values) for value in values]


def label_loss(outputs: Tensor, targets: object) -> Tensor:
    return F.cross_entropy(outputs, targets["label"], reduction="sum")  # type: ignore[index]


@settings(max_examples=30, deadline=None)
@given(method=st.sampled_from(METHODS), classes=st.integers(2, 6), seed=st.integers(0, 2**31), steps=st.integers(1, 6))
def test_losses_and_averages_are_those_of_the_papers(method: str, classes: int, seed: int, steps: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    rule, reference = Rule(method=method, classes=classes), Reference.first(method, classes)  # type: ignore[arg-type]
    running = rule.first_averages()
    loss = semi_loss(label_loss, rule, weight=0.7)
    for _ in range(steps):
        labelled, n = 5, int(torch.randint(1, 12, (), generator=draw))
        outputs = (4 * torch.randn(labelled + 2 * n, classes, generator=draw)).requires_grad_()
        targets = {"label": torch.randint(classes, (labelled,), generator=draw)}
        sums = torch.zeros(rule.sums)
        extra = {LABELS: torch.full((n,), -1), RUNNING: running, SCALE: torch.tensor(labelled / n), SUMS: sums}
        found = loss(outputs, {**targets, **extra})
        weak, strong = (outputs.detach()[part].double().softmax(1).tolist() for part in (slice(5, 5 + n), slice(5 + n, None)))
        judged = reference.judged(weak)
        each = [-weight * math.log(p[guess]) for (guess, weight, _), p in zip(judged, strong, strict=True)]
        expected = float(label_loss(outputs.detach()[:labelled].double(), targets)) + labelled * 0.7 * sum(each) / n
        if method == "freematch":
            expected += labelled * 0.001 * reference.fairness(judged, strong)
        assert float(found.detach()) == pytest.approx(expected, rel=1e-3, abs=1e-4)
        (gradient,) = torch.autograd.grad(found, outputs)
        assert not gradient[labelled : labelled + n].any(), "a guess has no gradient"
        reference.update(judged, weak)
        running = averaged(rule, running, sums)
        known = [reference.mean, reference.variance, reference.updates, *reference.by_class, *reference.guessed]
        torch.testing.assert_close(running, torch.tensor(known), rtol=1e-3, atol=1e-5)


def test_a_sure_guess_counts_and_an_unsure_one_less() -> None:
    probabilities = torch.tensor([[0.97, 0.02, 0.01], [0.5, 0.3, 0.2]])
    fix, soft = (Rule(method=method, classes=3) for method in ("fixmatch", "softmatch"))  # type: ignore[arg-type]
    assert judge(fix, probabilities, fix.first_averages()).weights.tolist() == [1.0, 0.0]
    running = soft.first_averages()
    running[semi.MEAN], running[semi.VARIANCE] = 0.9, 0.04
    weights = judge(soft, probabilities, running).weights
    assert weights[0] == 1.0
    assert float(weights[1]) == pytest.approx(math.exp(-(0.4**2) / (2 * 0.04 / 4)))


def test_images_that_cannot_be_read_count_nothing_and_stay_in_the_divisor() -> None:
    rule = Rule(method="softmatch", classes=3)
    running, outputs = rule.first_averages(), torch.randn(2 + 2 * 4, 3)
    common = {"label": torch.tensor([0, 1]), RUNNING: running, SCALE: torch.tensor(2 / 4)}

    def summed(labels: list[int], kept: Tensor) -> tuple[float, Tensor]:
        sums = torch.zeros(rule.sums)
        found = semi_loss(label_loss, rule, weight=1.0)(kept, {**common, LABELS: torch.tensor(labels), SUMS: sums})
        return float(found), sums

    loss, sums = summed([-1, BAD_IMAGE, 2, BAD_IMAGE], outputs)
    fewer, same = summed([-1, 2], outputs[[0, 1, 2, 4, 6, 8]])
    assert loss == pytest.approx(fewer)
    assert torch.equal(sums, same)
    assert summed([BAD_IMAGE] * 4, outputs)[0] == pytest.approx(float(label_loss(outputs[:2], common)))
    nothing = summed([BAD_IMAGE] * 4, outputs)[1]
    assert torch.equal(averaged(rule, running, nothing), running)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), parts=st.integers(1, 8), method=st.sampled_from(METHODS))
def test_sums_say_how_good_the_guesses_were(seed: int, parts: int, method: str) -> None:
    draw = torch.Generator().manual_seed(seed)
    rule = Rule(method=method, classes=4, threshold=0.5)  # type: ignore[arg-type]
    probabilities = (3 * torch.randn(16, 4, generator=draw)).softmax(1)
    labels = torch.randint(-1, 4, (16,), generator=draw)
    running = rule.first_averages()
    judged = judge(rule, probabilities, running)
    pieces = zip(probabilities.tensor_split(parts), labels.tensor_split(parts), strict=True)
    total = tree_sum([sums_of(rule, judge(rule, p, running), p, some, running) for p, some in pieces], torch.add)
    found = told(rule, total.tolist())
    known = labels >= 0
    right = (labels == judged.guesses) & known
    assert found["unlabelled_count"] == 16
    assert found["unlabelled_used"] == (judged.weights > 0.5).sum() / 16
    assert found["unlabelled_weight"] == pytest.approx(float(judged.weights.mean()), abs=1e-6)
    assert found["unlabelled_guesses"] == judged.guesses.bincount(minlength=4).tolist()
    if known.any():
        assert found["unlabelled_right"] == pytest.approx(int(right.sum()) / int(known.sum()))
        if judged.weights[known].any():
            used_right = float((judged.weights * right).sum() / (judged.weights * known).sum())
            assert found["unlabelled_used_right"] == pytest.approx(used_right, rel=1e-5)
    else:
        assert "unlabelled_right" not in found


# --- the stream ---------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 400),
    batch=st.integers(1, 8),
    ratio=st.integers(1, 7),
    virtual_ranks=st.integers(1, 5),
    seed=st.integers(0, 2**63 - 1),
    window=st.sampled_from((0, 64)),
)
def test_each_unlabelled_image_comes_once_an_epoch_of_their_own(
    count: int, batch: int, ratio: int, virtual_ranks: int, seed: int, window: int
) -> None:
    config = RunConfig(
        data=DataConfig(batch_size=batch * virtual_ranks, shuffle_window=window, unlabelled="more"),
        train=TrainConfig(virtual_ranks=virtual_ranks, seed=seed, unlabelled_ratio=ratio),
    )
    order = order_of_unlabelled(config, manifest_of(count))
    for epoch in (0, 3):
        steps = range(order.steps_per_epoch)
        seen = [[order.samples(epoch, step, rank) for rank in range(virtual_ranks)] for step in steps]
        assert sorted(int(each) for step in seen for part in step for each in part) == list(range(count))
        sizes = [sum(map(len, step)) for step in seen]
        assert max(sizes) - min(sizes) <= 1, "no step has a few images only"
        assert sizes == [order.batch_count(step) for step in steps]
        assert max(sizes) <= batch * ratio * virtual_ranks


def manifest_of(count: int):  # type: ignore[no-untyped-def]
    from dataio.manifest import Manifest, SplitInfo

    return Manifest(
        targets=single_label(("unknown",)),
        splits={UNLABELLED: SplitInfo(count=count, shards=())},
        fingerprint="ab" * 32,
        image_sizes={"8x8": count},
        quarantined=0,
        source="folder",
        identity="cd" * 32,
    )


def test_both_views_are_functions_of_seed_epoch_and_image() -> None:
    config = RunConfig(data=DataConfig(unlabelled="more", pad=0), train=TrainConfig(virtual_ranks=1))
    task = make_task(TaskConfig(), single_label(CLASSES), label_smoothing=0.0)
    order = order_of_unlabelled(config, manifest_of(40))
    stream = SecondStream(order=order, target=single_label(("class-1", "x"))[0])
    draw = np.random.default_rng(0)
    images = torch.from_numpy(draw.integers(0, 255, (6, 3, 16, 16)).astype(np.uint8))
    images[5] = 0

    def views(ids: list[int], epoch: int = 2, seed: int = 0) -> semi.TwoViews:
        its = semi_of(dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed)), task, stream, torch.device("cpu"))
        some = torch.tensor(ids)
        labels = torch.tensor([0, 1, -1, 0, 1, 0])
        return its.views(
            Batch(samples=images[some], targets={"label": labels[some]}, ids=np.array(ids), epoch=epoch, step=9, virtual_rank=0)
        )

    all_of, few = views([0, 1, 2, 3, 4, 5]), views([4, 1])
    assert torch.equal(all_of.weak, images)
    assert torch.equal(few.strong, all_of.strong[[4, 1]])
    assert not torch.equal(views([0], epoch=3).strong, all_of.strong[:1])
    assert not torch.equal(views([0], seed=1).strong, all_of.strong[:1])
    assert all_of.labels.tolist() == [1, -1, -1, 1, -1, BAD_IMAGE]


# --- what is asked for --------------------------------------------------------------------------------------------------------------------


def wrong_with(*flags: str) -> str:
    config = parse([*BATCHES, *TINY, *flags]).config
    return "\n".join(problems_of(survey(config, workers=lambda: 1, in_job=False)))


def test_what_does_not_fit_is_refused_with_its_rule(photos: Path, unlabelled: Path, tmp_path: Path) -> None:
    storage = ("--storage", str(tmp_path / "runs"), "--data.root", str(tmp_path / "root"))
    given = ("--data.path", str(photos), "--data.unlabelled", str(unlabelled), *storage)
    assert wrong_with(*given) == ""
    assert "data.unlabelled='nowhere' does not exist" in wrong_with("--data.path", str(photos), "--data.unlabelled", "nowhere", *storage)
    several = wrong_with(*given, "--data.targets", "label:labels")
    assert "is for a classification with one label an image, and this run learns label (labels)" in several
    big = tmp_path / "big"
    big.mkdir()
    Image.fromarray(np.full((9, 8, 3), 90, np.uint8)).save(big / "1.png")
    sizes = wrong_with("--data.path", str(photos), "--data.unlabelled", str(big), *storage)
    assert "holds images of 9x8 pixels (height x width), and the run's are of 8x8; data.fit=refuse would leave them all out" in sizes
    for index in range(30):
        (big / f"bad-{index}.png").write_bytes(b"no image")
    assert "data.unlabelled: 30 of 31 samples are bad" in wrong_with(*given[:2], "--data.unlabelled", str(big), *storage)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "is no data set that can be read: it holds nothing" in wrong_with(*given[:2], "--data.unlabelled", str(empty), *storage)


@pytest.mark.parametrize(
    ("unlabelled", "train", "problem"),
    [
        ("", {"unlabelled_ratio": 2}, r"train\.unlabelled_ratio is set, but there are no images without labels"),
        ("", {"control": "r"}, r"train\.control is set, but there are no images"),
        ("x", {"threshold": 0.8}, r"train\.threshold=0\.8 belongs to train\.semi=fixmatch"),
        ("x", {"semi": "fixmatch", "semi_decay": 0.9}, r"train\.semi_decay=0\.9 is of the averages"),
        ("x", {"compile": True, "cuda_graphs": "on"}, r"use --train\.no-cuda-graphs"),
        ("x", {"unlabelled_ratio": 0}, r"train\.unlabelled_ratio=0 must be at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(unlabelled: str, train: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        validate(RunConfig(data=DataConfig(unlabelled=unlabelled), train=TrainConfig(**train)))


def test_unlabelled_images_count_by_their_content_wherever_they_lie(unlabelled: Path, tmp_path: Path) -> None:
    def named(folder: Path, root: str, **train: Any) -> dict[str, object]:
        data = DataConfig(unlabelled=str(folder), root=str(tmp_path / root))
        data = dataclasses.replace(data, unlabelled=pin(prepare_unlabelled(data)))
        return identity(RunConfig(data=data, train=TrainConfig(**train)), "x")

    copied = tmp_path / "copied"
    shutil.copytree(unlabelled, copied)
    first = named(unlabelled, "a")
    assert first == named(copied, "b")
    assert str(first["data.unlabelled"]).startswith("sha256:")
    assert first != named(unlabelled, "a", semi="freematch")
    assert "data.unlabelled" not in identity(RunConfig(), "x")
    assert not {key for key in identity(RunConfig(), "x") if "unlabelled" in key or "semi" in key or "threshold" in key}
    next(copied.rglob("*.png")).unlink()
    assert first != named(copied, "b")


# --- whole runs ---------------------------------------------------------------------------------------------------------------------------


def test_a_kill_in_the_middle_of_an_epoch_changes_no_bit(photos: Path, unlabelled: Path, tmp_path: Path) -> None:
    flags = ("--data.unlabelled", str(unlabelled), "--train.epochs", "12", "--train.checkpoint-every", "3")
    flags = (*flags, "--train.unlabelled-ratio", "2", "--data.policy", "trivial", "--train.ledger", "--train.eval-every-epochs", "4")
    whole = run_of(tmp_path / "whole", photos, *flags)
    assert whole.live()
    killed = run_of(tmp_path / "killed", photos, *flags)

    def once(step: int, where: str) -> None:
        if (where, step, killed.attempts) in (("saved", 3, 1), ("saved", 9, 2), ("evaluated", 16, 3)):
            raise Killed

    assert [killed.live(once) for _ in range(4)] == [False, False, False, True]
    assert killed.result["weights_sha256"] == whole.result["weights_sha256"]
    assert killed.result["history"]["unlabelled"] == whole.result["history"]["unlabelled"]
    seen = whole.result["history"]["unlabelled"]
    assert seen["unlabelled_count"] in (187, 186, 188), "8 steps of 23 or 24 images"
    assert seen["unlabelled_known"] < seen["unlabelled_count"], "a class that the run does not know"
    ledger = seen_of(killed.folder / "ledger" / UNLABELLED)
    assert ledger == seen_of(whole.folder / "ledger" / UNLABELLED)
    for epoch in range(8):
        assert sorted(ids for step in ledger[epoch] for ids in step) == list(range(70)), "each once"


def seen_of(folder: Path) -> dict[int, list[tuple[int, ...]]]:
    """Epoch of the second stream -> the ids of its steps' virtual ranks, in order."""
    from cluster.ledger import read_ledger

    epochs: dict[int, list[tuple[int, ...]]] = {}
    for record in read_ledger(folder):
        epochs.setdefault(record.epoch, []).append(record.ids)
    return epochs


def test_two_workers_end_in_the_bits_of_one(photos: Path, unlabelled: Path, tmp_path: Path) -> None:
    flags = ("--train.epochs", "4", "--train.semi", "freematch", "--data.unlabelled")
    one = run_of(tmp_path / "one", photos, *flags, str(unlabelled))
    assert one.live()
    words = ["--data.path", str(photos), *BATCHES, *TINY, *flags, one.config.data.unlabelled]
    two = subprocess.run(
        [sys.executable, "-m", "tests.trainer.lives", str(tmp_path / "two"), *words], capture_output=True, text=True, check=False
    )
    assert two.returncode == 0, two.stderr
    result = json.loads(two.stdout.splitlines()[-1])["result"]
    assert result["weights_sha256"] == one.result["weights_sha256"]
    assert result["history"]["unlabelled"] == one.result["history"]["unlabelled"]


def test_two_workers_under_ddp_learn_what_the_ordered_sum_does(photos: Path, unlabelled: Path, tmp_path: Path) -> None:
    """Each worker carries one virtual rank, so both add up the same parts, in another order: guesses and thresholds over both workers."""
    flags = ("--train.epochs", "4", "--train.semi", "freematch", "--train.precision", "fp32", "--data.unlabelled")
    ordered = run_of(tmp_path / "ordered", photos, *flags, str(unlabelled))
    assert ordered.live()
    words = ["--data.path", str(photos), *BATCHES, *TINY, *flags, ordered.config.data.unlabelled, "--train.reduction", "ddp"]
    ddp = subprocess.run(
        [sys.executable, "-m", "tests.trainer.lives", str(tmp_path / "ddp"), *words], capture_output=True, text=True, check=False
    )
    assert ddp.returncode == 0, ddp.stderr
    found, wanted = json.loads(ddp.stdout.splitlines()[-1])["result"]["history"]["unlabelled"], ordered.result["history"]["unlabelled"]
    assert found["unlabelled_count"] == wanted["unlabelled_count"] == 24, "of both workers"
    assert found.keys() == wanted.keys()
    for key in found:  # another order of additions may move a guess that is at a threshold
        is_share = not isinstance(found[key], list) and wanted[key] <= 1
        assert found[key] == pytest.approx(wanted[key], abs=0.06 if is_share else 1.01), key


def test_a_run_without_the_images_is_another_and_has_no_trace_of_them(photos: Path, unlabelled: Path, tmp_path: Path) -> None:
    flags = ("--train.epochs", "2", "--train.virtual-ranks", "1", "--train.accumulate", "2")
    alone = run_of(tmp_path / "alone", photos, *flags)
    assert alone.live()
    assert not list(alone.folder.rglob("semi.safetensors"))
    assert "unlabelled_used" not in pq.read_schema(alone.folder / "curves.parquet").names
    assert not any("unlabelled_used" in event for event in alone.events)
    beside = run_of(tmp_path / "beside", photos, *flags, "--data.unlabelled", str(unlabelled))
    assert beside.live()
    assert beside.result["weights_sha256"] != alone.result["weights_sha256"]
    assert beside.result["steps_done"] == alone.result["steps_done"]
    assert "- **Images without labels:** `unlabelled-folder-" in (beside.folder / "model" / "README.md").read_text()
    curves = pq.read_table(beside.folder / "curves.parquet")
    assert curves["unlabelled_weight"].null_count == 0
    (told_of, *_) = [event for event in beside.events if event["event"] == "evaluation"]
    assert 0 < told_of["unlabelled_weight"] <= 1
    state = beside.newest
    assert state is not None
    model = torch.nn.Linear(2, 2)
    with pytest.raises(StateError, match="was made with unlabelled images, and this run goes on without them"):
        TrainState(model, torch.optim.SGD(model.parameters(), lr=1)).load(state.read)


def test_a_bad_image_is_quarantined_by_key_and_changes_nothing_else(photos: Path, unlabelled: Path, tmp_path: Path) -> None:
    """A converted image whose bytes do not decode: a JPEG cut short is such a one, and is counted with the others."""
    folder = tmp_path / "more"
    shutil.copytree(unlabelled, folder)
    flags = ("--train.epochs", "3", "--train.eval-every-epochs", "3")  # six steps, which are an epoch of the 70 images
    lives = run_of(tmp_path / "run", photos, *flags, "--data.unlabelled", str(folder))
    decode = ImageCodec.decode

    def but_one(codec: ImageCodec, encoded: Any, out: Any) -> Any:
        bad = decode(codec, encoded, out)
        if len(encoded) != 70:
            return bad
        out[7] = 0
        return (*bad, (7, "truncated: for the test"))

    with patch.object(ImageCodec, "decode", but_one):
        assert lives.live()
    (line,) = (lives.folder / "quarantine.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["split"], record["sample_id"], record["reason"]) == (UNLABELLED, 7, "truncated: for the test")
    assert record["key"].endswith(".png")
    assert lives.result["history"]["unlabelled"]["unlabelled_count"] == 69


# --- steps --------------------------------------------------------------------------------------------------------------------------------


def learner_of(method: str = "softmatch", count: int = 40, **train: Any) -> Learner:
    settled = {"precision": "fp32", "channels_last": "off", "small_maps": "convolution", "virtual_ranks": 2, **train}
    config = RunConfig(
        data=DataConfig(batch_size=8, unlabelled="more"),
        model=ModelConfig(name="tests.trainer.lives:tiny", weights="none"),
        train=TrainConfig(semi=method, **settled),  # type: ignore[arg-type]
    )
    task = make_task(TaskConfig(), single_label(CLASSES), label_smoothing=0.0)
    order = order_of_unlabelled(config, manifest_of(count))
    stream = SecondStream(order=order, target=single_label(("unknown",))[0])
    learner = build_learner(config, task, (8, 8), torch.device("cpu"), stream=stream)
    learner.set_trainable(0)
    learner.set_learning_rate(0, 10)
    return learner


def batches_for(learner: Learner, step: int, sizes: tuple[int, ...]) -> tuple[Batch, ...]:
    """Labelled images as `sizes` says, and those without labels as their order does."""
    assert learner.semi is not None
    draw = torch.Generator().manual_seed(step)

    def images(count: int) -> Tensor:
        return torch.randint(0, 256, (count, 3, 8, 8), generator=draw, dtype=torch.uint8)

    made = []
    for rank, size in enumerate(sizes):
        order = learner.semi.order
        ids = order.samples(step // order.steps_per_epoch, step % order.steps_per_epoch, rank)
        common = {"epoch": 0, "step": step, "virtual_rank": rank}
        more = Batch(samples=images(len(ids)), targets={"label": torch.full((len(ids),), -1)}, ids=ids, **common)  # type: ignore[arg-type]
        labels = torch.randint(3, (size,), generator=draw)
        made.append(Batch(samples=images(size), targets={"label": labels}, ids=np.arange(size), unlabelled=more, **common))  # type: ignore[arg-type]
    return tuple(made)


def weights_after(learner: Learner, sizes: tuple[int, ...], steps: int = 3) -> list[Tensor]:
    stepper = learner.stepper()
    for step in range(steps):
        loss = stepper.step(batches_for(learner, step, sizes), global_count=sum(sizes), step=step)
        assert bool(loss.isfinite())
    return [parameter.detach().clone() for parameter in learner.model.parameters()]


def graph_as_it_is(graph: Any, inputs: Any, **options: Any) -> Any:
    """A compiler that takes any options."""
    return graph.forward


def test_a_compiled_step_does_what_the_plain_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "COMPILER", graph_as_it_is)
    torch._dynamo.reset()
    for virtual_ranks, sizes in ((1, (8,)), (2, (4, 4))):
        plain, compiled = (learner_of("freematch", virtual_ranks=virtual_ranks, compile=compiles) for compiles in (False, True))
        assert compiled.stepper().compile_ahead((3, 8, 8)) > 0
        assert compiled.semi is not None
        assert plain.semi is not None
        assert torch.equal(compiled.semi.running, plain.semi.rule.first_averages()), "a blank batch leaves no trace"
        for ours, theirs in zip(weights_after(compiled, sizes), weights_after(plain, sizes), strict=True):
            torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(compiled.semi.running, plain.semi.running)


def test_a_virtual_rank_without_labelled_images_learns_from_the_others() -> None:
    learner = learner_of()
    assert learner.semi is not None
    before = [parameter.detach().clone() for parameter in learner.model.parameters()]
    after = weights_after(learner, (3, 0), steps=1)
    assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert learner.semi.newest[semi.COUNT] == 8
    assert learner.semi.running[semi.UPDATES] == 1


def test_the_step_s_loss_is_that_of_its_virtual_ranks_together_and_judged_by_the_steps_before() -> None:
    """In eval mode, where no statistics couple the images: the loss is the labels' mean plus the mean over all unlabelled images."""
    learner = learner_of("fixmatch")
    learner.model.eval()
    assert learner.semi is not None
    batches = batches_for(learner, 0, (4, 4))
    views = [learner.semi.views(batch.unlabelled) for batch in batches if batch.unlabelled is not None]
    with torch.no_grad():
        outputs = [learner.model(learner.preprocess(batch.samples)) for batch in batches]
        weak = torch.cat([learner.model(learner.preprocess(each.weak)) for each in views]).softmax(1)
        strong = torch.cat([learner.model(learner.preprocess(each.strong)) for each in views])
    labels = torch.cat([batch.targets["label"] for batch in batches])
    kept = (weak.max(1).values >= 0.95).float()
    expected = F.cross_entropy(torch.cat(outputs), labels) + (kept * F.cross_entropy(strong, weak.argmax(1), reduction="none")).sum() / 8
    loss = learner.stepper().step(batches, global_count=8, step=0)
    torch.testing.assert_close(loss, expected)


# --- what the driver says -----------------------------------------------------------------------------------------------------------------


def test_a_run_says_what_it_found_and_warns_of_test_images(photos: Path, unlabelled: Path, tmp_path: Path) -> None:
    more = tmp_path / "more"
    shutil.copytree(unlabelled, more)
    (more / "bad.png").write_bytes(b"no image")
    said: list[str] = []
    console = Console(file=io.StringIO(), width=500)
    data = DataConfig(path=str(photos), root=str(tmp_path / "root"), unlabelled=str(more))
    labelled = prepared(data).dataset
    found = open_second(RunConfig(data=data), labelled, console)
    assert found is not None
    assert "70 images without labels, learned by softmatch; 1 that could not be used are left out" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "warning" not in console.file.getvalue()  # type: ignore[attr-defined]
    for index, image in enumerate(sorted((photos / "test").rglob("*.png"))[:3]):
        shutil.copy(image, more / f"copied-{index}.png")
    found = open_second(RunConfig(data=data), labelled, console)
    assert "warning: 3 of the images without labels are test images too" in console.file.getvalue()  # type: ignore[attr-defined]
    assert found is not None
    storage = open_storage(tmp_path / "runs")
    record_left_out(storage, "run", labelled, said.append, found.dataset)
    (line,) = storage.read("run/quarantine.jsonl").splitlines()
    assert {"key": "bad.png", "split": UNLABELLED, "stage": "conversion"}.items() <= json.loads(line).items()
    assert said == []

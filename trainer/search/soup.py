"""One model from several trials: a greedy soup (Wortsman et al. 2022, "Model soups"). Called by __main__.py with --soup.

The trials that were trained to the end began with the same pretrained weights, so that their weights can be averaged: from the best down,
each is taken into the average if the validation split likes the average no worse with it. BatchNorm's statistics belong to no average: they
are computed anew over training images, as many as LEARNING_BATCHES hold. The soup lies beside the trials in a folder like a run's, which
`predict`, `evaluate` and `export` take."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cluster.storage import Storage
from dataio.batch import Batch
from dataio.loader import Loader
from dataio.quarantine import BadSample
from trainer.export.model_folder import export_model, verified_weights
from trainer.learn.state import weights_sha256
from trainer.rank.evaluation import evaluate
from trainer.rank.finished import Opened, open_finished
from trainer.runs.choice import VALIDATION, Rule
from trainer.runs.folder import RunFolder
from trainer.runs.model_files import described, model_of
from trainer.search.results import SOUP, Souped
from trainer.settings.identity import deciding_settings
from trainer.settings.spec import make_order
from trainer.settings.toml import to_toml
from trainer.settings.tree import RunConfig

LEARNING_BATCHES = 100
"""Training batches that BatchNorm's statistics are computed over."""


def mixable(configs: Sequence[RunConfig]) -> list[int]:
    """Which of the trials, the best first, have the best one's model and samples, so that their weights mean the same."""

    def what(config: RunConfig) -> dict[str, Any]:
        return {key: value for key, value in deciding_settings(config, "").items() if key.startswith(("model.", "data.mean", "data.std"))}

    return [number for number, config in enumerate(configs) if what(config) == what(configs[0])]


def soup(storage: Storage, names: Sequence[str], configs: Sequence[RunConfig], rule: Rule, device: torch.device) -> Souped:
    """Make the soup of the runs `names`, the best first, and write it if it has more than one in it. ValueError, OSError."""
    usable = [names[number] for number in mixable(configs)]
    opened = open_finished(RunFolder(storage=storage, name=usable[0]), {}, split=VALIDATION, device=device, may_be_of_texts=True)
    model, weights = opened.exported.model, [_weights(storage, name) for name in usable]
    members, best = [0], _score(opened, model, rule)
    for number in range(1, len(usable)):
        _become(opened, [weights[each] for each in (*members, number)])
        score = _score(opened, model, rule)
        if score is not None and (best is None or score >= best):
            members, best = [*members, number], score
    taken = tuple(usable[number] for number in members)
    shown = best if best is None or rule.measure.higher_is_better else -best
    if len(members) == 1:
        storage.delete_dir(SOUP)  # of fewer trials
        return Souped(members=taken, tried=len(usable), score=shown)
    _become(opened, [weights[number] for number in members])
    headline = opened.exported.task.info.headline
    result = _evaluated(opened, "test")
    entry = result.entry("test")
    sha256 = weights_sha256(model)
    summary = {
        **{
            key: opened.summary[key]
            for key in ("task", "classes", "dataset_fingerprint", "test_fingerprint", "steps")
            if key in opened.summary
        },
        **entry,
        "run": SOUP,
        "status": "finished",
        "workers": 1,
        "threads_per_worker": opened.threads,
        "weights_sha256": sha256,
        "members": list(taken),
    }
    config = dataclasses.replace(opened.config, run=SOUP, storage=storage.uri)
    storage.write_atomic(f"{SOUP}/config.toml", to_toml(config).encode())
    export_model(
        storage=storage,
        run=SOUP,
        tensors=model.state_dict(),
        config=config,
        task=opened.exported.task,
        data_image_size=opened.loader.shape,
        summary=summary,
        texts=opened.exported.texts,
    )
    storage.write_atomic(f"{SOUP}/summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    test = entry.get(headline.key)
    return Souped(members=taken, tried=len(usable), score=shown, test=test, weights_sha256=sha256)


def average(weights: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each tensor, computed in float64; of whole numbers (counters) the first one's."""
    mixed = {}
    for name, first in weights[0].items():
        if not first.is_floating_point():
            mixed[name] = first
            continue
        total = torch.zeros_like(first, dtype=torch.float64)
        for each in weights:
            total += each[name]
        mixed[name] = (total / len(weights)).to(first.dtype)
    return mixed


def relearn_statistics(model: nn.Module, preprocess: nn.Module, batches: Iterable[Tensor]) -> None:
    """Compute BatchNorm's running mean and variance anew, as the plain mean over `batches` of samples. The rest of the model evaluates."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for samples in batches:
            model(preprocess(samples))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def _weights(storage: Storage, name: str) -> dict[str, Tensor]:
    folder = model_of(RunFolder(storage=storage, name=name))
    tensors: dict[str, Tensor] = safetensors.torch.load(verified_weights(folder, described(folder)))
    return tensors


def _become(opened: Opened, weights: Sequence[Mapping[str, Tensor]]) -> None:
    model = opened.exported.model
    model.load_state_dict(average(weights), strict=True)
    if len(weights) > 1:
        relearn_statistics(model, opened.exported.preprocess, _training_samples(opened))


def _training_samples(opened: Opened) -> Iterator[Tensor]:
    """What a run sees in its first steps, changed as in training."""
    config = opened.config

    def on_bad(bad: BadSample) -> None:
        opened.quarantine.add(bad.key, bad.reason, bad.split, bad.sample_id)

    order = make_order(config, opened.dataset)
    loader = Loader(
        opened.dataset,
        config.data,
        order=order,
        virtual_ranks=range(order.virtual_ranks),
        device=opened.device,
        seed=config.train.seed,
        threads=opened.threads,
        on_bad=on_bad,
    )
    steps: Iterator[tuple[Batch, ...]] = islice(loader.train(0, min(LEARNING_BATCHES, order.steps_per_epoch)), LEARNING_BATCHES)
    for step in steps:
        yield from (batch.samples for batch in step if len(batch.samples) > 1)


def _evaluated(opened: Opened, split: str) -> Any:
    return evaluate(
        opened.exported.task,
        opened.exported.model,
        opened.exported.preprocess,
        opened.dataset,
        opened.loader,
        precision=opened.config.train.precision,
        split=split,
    )


def _score(opened: Opened, model: nn.Module, rule: Rule) -> float | None:
    return rule.value_of(_evaluated(opened, VALIDATION).entry(VALIDATION))

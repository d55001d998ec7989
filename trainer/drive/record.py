"""The identity record: what a run is, as its claims and its commits say it. start.py makes it and compares it; each rank puts it into the
commits (trainer.rank.saving).

What decides the weights must be the same whenever the run goes on: settings, weights file, data, and the decoder where images are resized.
Their digest names them. What may change their last bits (versions, threads, devices) is compared too, and told. Pure; the record is JSON.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.versions import versions
from dataio.codecs.image.decode import DECODER_VERSIONS, decoder_device
from dataio.manifest import Manifest, image_size_of, resizes
from trainer.settings.fields import declared
from trainer.settings.identity import EVALUATES, deciding_settings
from trainer.settings.texts import is_text
from trainer.settings.tree import RunConfig

_DECIDE_BITS = ("torch", "torchvision", "nvidia-dali-cuda130", "numpy")
_SHOWN = 12  # characters of a hash


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """What decides a run's weights, and what may change their last bits."""

    settings: Mapping[str, Any]
    """trainer.settings.identity.deciding_settings, all autos decided, as JSON has them."""
    weights: str
    """SHA-256 of the weights file; "" if `model.weights` names none."""
    dataset: str
    """The data's fingerprint."""
    decoder: Mapping[str, int]
    """Type of device -> version of the decoder; empty if no image is resized, as all versions then give the same pixels."""
    device: str
    """Type of device that the ranks compute on: cpu or cuda."""
    threads: int
    """Threads of a worker."""
    versions: Mapping[str, str]
    """Versions of the libraries that compute."""
    weights_about: str = ""
    """SHA-256 of the description that lies beside the weights file and says what its head was trained for; "" if there is none."""
    decoded_on: str = ""
    """Type of device that decodes the images: cpu or cuda. "" in the records of older releases, where it was `device`."""

    @property
    def digest(self) -> str:
        """Of what decides."""
        return _digest({"settings": self.settings, "dataset": self.dataset, "decoder": self.decoder})

    def record(self) -> dict[str, Any]:
        return {"digest": self.digest, **dataclasses.asdict(self)}


def identity_of(
    config: RunConfig,
    manifest: Manifest,
    *,
    weights: str,
    device: str,
    threads: int,
    weights_about: str = "",
    more_is_resized: bool = False,
) -> Identity:
    """The identity of the run with these settings, in which all autos are decided, on this data. `more_is_resized`: so are images without
    labels, which are resized."""
    return Identity(
        settings=_plain(deciding_settings(config, weights)),
        weights=weights,
        dataset=manifest.fingerprint,
        decoder=dict(DECODER_VERSIONS) if more_is_resized or resizes(manifest, config.data) else {},
        device=device,
        threads=threads,
        versions=_versions(config),
        weights_about=weights_about,
        decoded_on=_decoded_on(config, manifest, device),
    )


def _decoded_on(config: RunConfig, manifest: Manifest, device: str) -> str:
    """Type of device that decodes; "" for texts, which became tokens before."""
    if manifest.texts is not None:
        return ""
    return decoder_device(*image_size_of(manifest, config.data), fit=config.data.fit, device=device)


def record_of(note: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The record in a claim's note or a commit's meta; None if an older release wrote it."""
    record: Mapping[str, Any] | None = note.get("identity")
    return record


def changes(then: Mapping[str, Any], now: Identity) -> dict[str, tuple[Any, Any]]:
    """By which settings, weights or data a run of the record `then` would not be that of `now`, each with its value then and now. A
    setting that one of the two does not name has its default there, or what runs did before there was it. The decoder is compared on
    the device that decodes now only; `bit_changes` says whether it is another one."""
    defaults = {key: setting.before for key, setting in declared(RunConfig).items()}
    before, after = then["settings"], now.settings
    found = {
        key: (_value(before, key, defaults), _value(after, key, defaults))
        for key in sorted(before.keys() | after.keys())
        if (key != EVALUATES or (key in before and key in after))  # where one of the two does not choose by it, that is the difference
        if _value(before, key, defaults) != _value(after, key, defaults)
    }
    if then["dataset"] != now.dataset:
        found["data.path"] = (f"data set {then['dataset'][:_SHOWN]}", f"data set {now.dataset[:_SHOWN]}")
    decoded, decodes = then["decoder"].get(now.decoded_on), now.decoder.get(now.decoded_on)
    if decoded is not None and decodes is not None and decoded != decodes:
        found["decoder"] = (f"version {decoded}", f"version {decodes}")
    return found


def told_changes(found: Mapping[str, tuple[Any, Any]]) -> str:
    """Text such as `optim.lr: 0.1 then, 0.2 now; ...`."""
    return "; ".join(f"{key}: {_shown(then)} then, {_shown(now)} now" for key, (then, now) in found.items())


def bit_changes(meta: Mapping[str, Any], now: Identity, *, workers: int) -> dict[str, tuple[Any, Any]]:
    """What may change the last bits of a run that goes on from the commit with this meta: versions, threads, the type of device, with
    `train.reduction=ddp` the number of workers; and, by more than that, the type of device that decodes its images. Older commits do not
    say everything; what they do not say is not compared."""
    record = record_of(meta) or {}
    before = {**meta.get("versions", {}), **record.get("versions", {})}
    pairs: dict[str, tuple[Any, Any]] = {name: (before.get(name), version) for name, version in now.versions.items()}
    pairs["threads"] = (record.get("threads", meta.get("threads")), now.threads)
    pairs["device"] = (record.get("device"), now.device)
    pairs["decoder"] = (record.get("decoded_on") or record.get("device"), now.decoded_on or now.device)
    if now.settings.get("train.reduction") == "ddp":
        pairs["workers"] = (meta.get("world_size"), workers)
    return {name: (then, value) for name, (then, value) in pairs.items() if then is not None and then != value}


def told_bit_changes(found: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """A line for each, for the user."""
    lines = []
    for name, (then, now) in found.items():
        match name:
            case "threads":
                what, keeps = "threads of a worker", f"--cluster.threads-per-worker {then} keeps them"
            case "device":
                what, keeps = "type of device", "the other one keeps them"
            case "decoder":
                lines.append(
                    f"decoder: on the {then} before, on the {now} now; pixels of JPEGs and of resized images differ by a few levels "
                    f"between them, and so the weights differ from an uninterrupted run's (workers on a {then} keep them)"
                )
                continue
            case "workers":
                what, keeps = "workers with train.reduction=ddp", f"--workers {then} keeps them"
            case _:
                what, keeps = name, f"{name} {then} keeps them"
        lines.append(f"{what}: {then} before, {now} now; the weights may differ in their last bits from an uninterrupted run's ({keeps})")
    return lines


def told_threads(asked: RunConfig, *, device: str, threads: int) -> list[str]:
    """What to tell a user who fixes the virtual ranks, so that the weights are the same for any number of workers: on CPUs they also depend
    on the threads of a worker, which are as many as it has CPUs, and so fewer for more workers. Holding them at what the virtual ranks
    would get would cost one worker on two CPUs half of its speed."""
    train, cluster = asked.train, asked.cluster
    if device != "cpu" or not train.virtual_ranks or train.reduction != "tree" or cluster.threads_per_worker or ":" in asked.workers:
        return []
    return [
        f"train.virtual_ranks={train.virtual_ranks} gives the same bits for any number of workers with equally many threads; "
        f"--cluster.threads-per-worker {threads} holds them at what they are here"
    ]


def _versions(config: RunConfig) -> dict[str, str]:
    known = versions()
    found = {name: known[name] for name in _DECIDE_BITS}
    library = "timm" if config.model.name.startswith("timm/") else "transformers" if is_text(config.model) else ""
    if library:  # its code is the model
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = "missing"
    return found


def _value(settings: Mapping[str, Any], key: str, defaults: Mapping[str, Any]) -> Any:
    return settings[key] if key in settings else _plain(defaults.get(key))


def _plain(value: Any) -> Any:
    """`value` as JSON gives it back, so that it equals one that was saved."""
    return json.loads(json.dumps(value))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _shown(value: Any) -> str:
    return repr(value[: len("sha256:") + _SHOWN] if isinstance(value, str) and value.startswith("sha256:") else value)

"""The end of a successful attempt: what rank 0 writes into the run's folder and hands to the driver. worker.py calls it after the last
checkpoint is committed. trainer.export writes the model folder.
"""

from dataclasses import fields
from functools import partial
from typing import Any

from cluster.beat import EXPORTING
from cluster.storage import Storage
from trainer.export.model_folder import export_model, text_export
from trainer.learn.build import Learner
from trainer.learn.state import weights_sha256
from trainer.models.adapters import merged
from trainer.models.stem import enlarging_of
from trainer.rank.data import RankData
from trainer.rank.explain import explain
from trainer.rank.final import Kept
from trainer.rank.novelty import novelty_of
from trainer.rank.saving import CURVES_FILE, Memory
from trainer.rank.this_rank import ThisRank
from trainer.tasks.calibration import stored


def finish(
    me: ThisRank,
    storage: Storage,
    learner: Learner,
    data: RankData,
    memory: Memory,
    *,
    ranks: list[dict[str, float]],
    stopped: bool,
    steps_done: int,
    kept: Kept | None = None,
) -> None:
    """Write the curves and, unless the run was stopped, the model; then hand over the result. `ranks`: the RankTotals of all ranks. `kept`:
    what the run keeps where a validation split was watched."""
    me.heartbeat.tick(EXPORTING)
    history, loader = memory.history, data.loader
    curves = memory.curves.to_parquet()
    me.waits.call(lambda: storage.write_atomic(f"{me.config.run}/{CURVES_FILE}", curves), CURVES_FILE)
    sha256 = weights_sha256(learner.model)
    last = kept.evaluation if kept is not None else history.evaluations[-1] if history.evaluations else {}
    result: dict[str, Any] = {
        "stopped": stopped,
        "steps_done": steps_done,
        "weights_sha256": sha256,
        "history": {each.name: getattr(history, each.name) for each in fields(history) if each.name not in ("evaluations", "guard")},
        "evaluation": last,
        "selection": kept.selection if kept is not None else None,
        "ranks": ranks,
        "parameters": sum(p.numel() for p in learner.model.parameters()),
        "cache": loader.cache,
        "backend": loader.backend_name,
        "decode_seconds": loader.decode_seconds,
        "device": str(learner.device),
    }
    if not stopped:
        ema = None if kept is not None and kept.is_best else learner.ema  # the best weights are in the model itself
        explain(me, storage, learner, data, ema=ema, step=steps_done)
        novelty = novelty_of(learner, data, ema=ema, most=me.config.train.novelty, on_batch=lambda: me.heartbeat.tick(EXPORTING))
        headline = learner.task.info.headline.key
        export = partial(
            export_model,
            storage=storage,
            run=me.config.run,
            tensors=merged(learner.model, ema.weights() if ema is not None else learner.model.state_dict()),
            config=me.config,
            task=learner.task,
            data_image_size=loader.shape,
            texts=text_export(me.config, data.dataset.manifest.texts),
            enlarged=enlarging_of(learner.model),
            calibration=stored(last.get("calibration")),
            novelty=novelty,
            summary={
                headline: last.get(headline),
                "test_loss": last.get("test_loss"),
                "steps": kept.step if kept is not None else steps_done,
                "weights_sha256": sha256,
                "dataset_fingerprint": data.dataset.manifest.fingerprint,
            },
        )
        me.waits.call(export, "the model folder")
    me.call("put_result", me.spec.attempt, result)

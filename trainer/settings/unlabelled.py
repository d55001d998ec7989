"""Rules about the settings of images without labels (`data.unlabelled`) that concern several of them. trainer.settings.rules calls it;
rules of one setting are at its field."""

from collections.abc import Iterator

from trainer.settings.tree import RunConfig, TrainConfig

BELONGS = ("semi", "unlabelled_ratio", "unlabelled_weight", "unlabelled_policy", "threshold", "semi_decay", "control")
"""Settings of `train` that mean nothing without a second stream."""


def unlabelled_problems(config: RunConfig) -> Iterator[str]:
    train, default = config.train, TrainConfig()
    if not config.data.unlabelled:
        for name in BELONGS:
            if getattr(train, name) != getattr(default, name):
                yield (
                    f"train.{name} is set, but there are no images without labels; name them (--data.unlabelled FOLDER), or leave it out"
                )
        return
    if train.threshold != default.threshold and train.semi != "fixmatch":
        yield (
            f"train.threshold={train.threshold:g} belongs to train.semi=fixmatch, and train.semi={train.semi} finds its own; add "
            "--train.semi fixmatch, or leave it out"
        )
    if train.semi_decay != default.semi_decay and train.semi == "fixmatch":
        yield (
            f"train.semi_decay={train.semi_decay:g} is of the averages of softmatch and freematch, and train.semi=fixmatch keeps none; "
            "leave it out"
        )
    if train.cuda_graphs == "on":
        yield (
            "train.cuda_graphs=on replays a step that writes nothing but gradients, and with data.unlabelled it also counts guesses; use "
            "--train.no-cuda-graphs"
        )

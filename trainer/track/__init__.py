"""Copies a run into an experiment tracker: `finetune track RUN --to tensorboard|mlflow|wandb`. `recorded` reads what the run's folder has,
`place` is the seam that `tensorboard`, `mlflow` and `wandb` fill in, `follow` brings one up to date and goes on until the run ends.

A process of its own: a tracker that is away, slow or wrong cannot hurt a run, and a run that was never tracked, or has ended, can be.
"""

"""One rank's life: data and model in, steps, evaluation, checkpoints, metrics. Forked by `cluster.rank`; nobody but the driver names it.

How a step is done is `learn`'s; when ranks stop together, and what a committed checkpoint is, is `cluster`'s."""

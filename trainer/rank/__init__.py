"""One rank's life: it opens data and model, trains, evaluates, saves checkpoints and exports metrics. The driver names `worker.train_rank`
(trainer.settings.spec), and `cluster.rank` calls it in a forked process.

`learn` defines a step. `cluster` decides when ranks stop together and what a committed checkpoint is. `drive.plan` uses `profile`, and
`trainer.evaluate` uses `finished`."""

"""The driver: it goes from settings and data to a running fleet, and drives the run to its end. `trainer.run` calls it.

The driver's process imports no torch; only the dry run does. `trainer.rank` does a rank's work, `cluster` starts and watches processes."""

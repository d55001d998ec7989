"""The training step: forward, backward, ordered reduction, update; also the optimiser, and the state that a checkpoint holds. `rank` and
the packages above it import it.

Nothing here logs, evaluates or writes files, and no step waits for the device: `rank` does all that."""

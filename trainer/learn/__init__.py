"""The step: forward, backward, ordered reduction, update; the optimiser, and the state that a checkpoint holds. `rank` and above import it.

Nothing here logs, saves, evaluates or waits for the device: that is `rank`'s."""

"""The driver: from settings and data to a running fleet, and from there to the end. Called by `trainer.run`. Imports no torch.

What a rank does is `rank`'s; how processes are started and watched is `cluster`'s."""

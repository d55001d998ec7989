"""A run's folder as one HTML page, and two runs compared: `python -m trainer.report`. Imports no torch.

Reads what `runs` finds; knows of a task what its `TaskInfo` says."""

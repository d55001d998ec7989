"""Writes a run's folder as one HTML page, or compares two runs: `python -m trainer.report`. Imports no torch.

`trainer.runs` finds the runs; what the report knows of a task comes from its `TaskInfo`. Imported by the driver, at a run's end."""

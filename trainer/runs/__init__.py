"""What a run's folder says of it: status, journal, summary and progress; `python -m trainer.runs` lists runs. Imports no torch.

Imported by drive, rank, report and the small commands. `report` makes pages; `rank` and `drive` write the folder."""

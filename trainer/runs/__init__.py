"""What is known of a run from its folder: its status, journal, summary and progress; `python -m trainer.runs` lists runs. Imports no torch.

Pages are `report`'s; what writes the folder is `rank`'s and `drive`'s."""

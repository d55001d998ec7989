"""What each learning feature is worth: against itself switched off, on real data, with paired seeds. `features.py` lists what is measured,
a line a feature; `tasks.py` the data; `measure.py` trains and judges."""

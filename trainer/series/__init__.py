"""Several ordinary runs, one after another, as one job that goes on where it was killed (train.py). For commands that need a handful of
runs to answer one question, such as trainer.curve; it knows nothing of what the runs mean together, and nothing of the driver."""

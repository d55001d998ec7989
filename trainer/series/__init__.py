"""Several ordinary runs, one after another, as one job that goes on where it was killed (train.py). For commands that need a handful of
runs to answer one question, such as trainer.curve; command.py is what their command lines have in common. It knows nothing of what the runs
mean together."""

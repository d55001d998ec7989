"""`finetune prune`: chooses the channels that a finished run's model can lose, and writes it without them (choose.py, __main__.py). What it
writes is an ordinary model with `model.widths`, which trainer.models.narrow builds; nothing else needs the package torch-pruning.

Only the command line and trainer.compress import it.
"""

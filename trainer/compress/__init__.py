"""`finetune compress`: makes a model small in stages, and says what each of them costs and saves. plan.py says which runs, measure.py asks
and times the models, results.py and page.py tell it; the runs are those of trainer.series, pruning is trainer.prune, int8 trainer.formats.

Only the command line imports it.
"""

"""How many more labels: the test error over the number of labelled samples, from runs on parts of them, and what twice as many would bring
(`finetune curve`, __main__.py). power_law.py and next_labels.py are pure; plan.py says which runs; results.py reads them; page.py draws.
Nobody imports this package but trainer.command and the benchmarks."""

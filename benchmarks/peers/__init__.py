"""A quickstart's job done by others and by us: how soon, how fast, in how much memory, and what one SIGKILL costs.
`python -m benchmarks.peers`; see `__main__.py`.

`plain_ray.py`, `hf_trainer.py`, `hf_trainer_texts.py` and `tutorial.py` are the peers' scripts: each is written as its tool's documentation
does it, and imports nothing of this project. `images.py` and `texts.py` are the jobs with everybody's command, `watch.py` runs one,
`judge.py` compares. This file has no imports.
"""

"""What a model is trained for: targets, loss, measures and predictions. `task.py` is the seam, `make.py` chooses; classification,
multilabel and multitask are the tasks, made of the heads (`heads.py`) of one label, several labels, a number. One of your own inherits
from `image.ImageTask`.

May be imported by everything but `settings` and the networks of `models`. How a step is done is `learn`'s, how a network is built
`models`', what a page shows `report`'s. `info.py` and `predictions.py` import no torch."""

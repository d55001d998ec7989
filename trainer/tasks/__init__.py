"""What a model is trained for: targets, loss, measures and predictions. `task.py` defines the interface, `make.py` chooses a task. The
tasks are classification, multilabel and multitask, made of heads (`heads.py`) for one label, several labels or a number. Your own task
inherits from `image.ImageTask`.

Everything may import it except `settings` and the networks of `models`. `learn` does the step, `models` builds networks, `report` shows the
results. `info.py` and `predictions.py` import no torch."""

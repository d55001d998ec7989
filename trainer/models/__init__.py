"""Networks: by name, their weights, stem and head, and the finished model as files. `learn`, `rank`, `drive` and the command lines
import it; `tasks` build the networks, and `export.py` reads tasks.

What the outputs mean is the task's; what moves the weights is `learn`'s."""

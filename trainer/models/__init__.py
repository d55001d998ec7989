"""Networks: by name, their weights, stem and head. Tasks build theirs here; `learn`, `rank` and `drive` ask about them.

What the outputs mean is the task's; what moves the weights is `learn`'s; the finished model as files is `export`'s.
"""

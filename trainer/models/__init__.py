"""Networks: built by name, with their weights, stem and head. Tasks build their networks here; `learn`, `drive` and `export` use the
helpers.

Tasks define what the outputs mean, `learn` updates the weights, and `export` writes the finished model.
"""

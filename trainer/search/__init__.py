"""Searches for better settings: many runs, of which the bad ones are stopped early (__main__.py is the command). A trial is an ordinary
run, and what the search decides is a function of what its runs have measured (ladder.py)."""

"""The user's settings: the tree with its rules, the command line, TOML files, which settings decide a run, and the spec that ranks get.
Everybody may import it.

It imports no torch, and nothing else from `trainer`. The code that reads a setting implements its effect."""

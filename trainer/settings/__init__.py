"""What a user may set, and how: the tree of settings with its rules, the command line and TOML files, which settings decide a run, what
ranks are told. Everybody may import it.

It imports no torch and nothing of `trainer` beside itself. What a setting does is its reader's business."""

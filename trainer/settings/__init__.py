"""What a user may set, and how: the tree of settings, the command line and TOML files, what ranks are told. Everybody may import it.

It imports no torch and nothing of `trainer` beside itself. What a setting does is its reader's business."""

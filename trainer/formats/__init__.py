"""A finished model in the formats of other programs: `finetune export`. Each format is a module that makes files of a loaded model and a
function that asks what lies in the files; `check` compares that with the model itself on the whole test set, and `manifest` says what was
made and measured. Nothing is written that does not pass.

Only the command line imports it. trainer.export writes and loads the model folder, which is what a run leaves; this package reads it.
"""

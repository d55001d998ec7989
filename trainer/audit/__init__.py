"""The audit of a data set before it is trained on: copies, leaks into the test, wrong labels, odd images or texts.
`python -m trainer.audit`, or `finetune audit`.

gather.py reads all images once, copies.py and looks.py judge what it keeps of them; texts.py, text_copies.py and text_looks.py do so for
texts, and kept.py is what both keep. folds.py has the runs trained that give each training sample an answer of a model that has not seen
it; labels.py judges the labels by these. findings.py puts all of it together and proposes changes, shown.py reads what page.py shows.
Nothing here trains: the folds are ordinary runs. Only tests and benchmarks import this package.
"""

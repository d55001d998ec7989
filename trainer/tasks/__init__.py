"""What a model is trained for: targets, loss, measures and predictions. Image classification is one task of several.

May be imported by everything but `settings`. How a step is done is `learn`'s, how a model is built `models`', what a page shows
`report`'s."""

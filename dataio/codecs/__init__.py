"""Codecs: bytes <-> rows, one package for each modality. Imported by `dataio.convert` and `dataio.loader`; knows no model and no Ray."""

"""Bytes <-> rows, one package for each kind of data. Imported by `dataio.convert` and `dataio.loader`; knows no model and no Ray."""

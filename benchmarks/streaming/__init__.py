"""Streaming input compared: our loader and five others on the same JPEGs. `python -m benchmarks.streaming`; see `__main__.py`.

This file has no imports, because every measured process loads it and its start is measured.
"""

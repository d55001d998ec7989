"""Streaming input compared: our loader and five others on the same JPEGs. `python -m benchmarks.streaming`; see `__main__.py`.

Kept free of imports: every measured process goes through here, and its start is measured.
"""

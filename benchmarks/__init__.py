"""Benchmarks: each module prints a table or, with --json, a result that names hardware, versions and command."""

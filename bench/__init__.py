"""Benchmarks: one module per op or system, each with cases() -> Case; `python -m bench.run` measures them."""

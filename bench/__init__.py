"""Benchmarks: one module per op or system, each with cases() -> Case; `python -m bench.run` measures them."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler counts memory here; its own log lines are noise

"""Kernel benchmarks. `python -m benchmarks.run` runs all of them and writes benchmarks/results/."""

"""Kernel benchmarks. `python -m benchmarks.kernels` runs all of them and writes benchmarks/results/."""

"""The GPU kernels' PTX, as nvcc and Triton make it, run on a processor and held to the reference.

`python -m ptx --help` (make ptx) runs all cases; the tests of this folder run a part of them.
"""

"""All of a GPU in one command: tests, kernels, whole steps."""

"""The kernels in Triton: for GPUs where the compiled library is missing, and for other vendors' GPUs."""

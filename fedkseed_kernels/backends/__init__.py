"""Who computes. A module of a backend has WRITES_FP32, unavailable() and seed_axpy()."""

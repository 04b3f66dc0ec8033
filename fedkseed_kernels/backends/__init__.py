"""Who computes. A module of a backend has WRITES_FP32, unavailable(device) and seed_axpy()."""

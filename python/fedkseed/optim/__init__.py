"""Zeroth-order optimizers: ZOSGD, FedKSeedSGD and what they measure."""

"""The noise contract in NumPy alone: what every backend must equal bit for bit (docs/noise-contract.md)."""

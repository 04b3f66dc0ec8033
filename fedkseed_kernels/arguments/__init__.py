"""From what callers write to checked operands and terms."""

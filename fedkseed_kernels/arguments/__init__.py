"""Checked operands and terms, made from what callers write."""

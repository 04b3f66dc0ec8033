"""Runnable scenarios on real models and data."""

"""Models and batches that the questions are asked of."""

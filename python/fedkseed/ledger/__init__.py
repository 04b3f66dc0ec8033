"""A fine-tuned model as a file of K coefficients, and how it becomes a model again."""

"""Experiments: scenarios as files, the runs they are made of, and the tables that compare them."""

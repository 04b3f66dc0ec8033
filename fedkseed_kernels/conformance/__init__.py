"""Holds a machine to the noise contract: golden vectors, checks of every operation, the exhaustive run."""

"""The version of the distribution: what the package says, and a test holds pyproject.toml to it."""

__version__ = "0.1.0"

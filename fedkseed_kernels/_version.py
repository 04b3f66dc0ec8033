"""The version of the distribution: read by the package and by pyproject.toml."""

__version__ = "0.2.0"

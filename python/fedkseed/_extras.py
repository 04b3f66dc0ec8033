"""Optional packages: imported where they are used, and missed with the name of the extra that brings them."""

from __future__ import annotations

import importlib.util


class MissingExtraError(ImportError):
    """A package of an extra of this distribution is not installed."""


def require_extra(extra: str, *packages: str) -> None:
    """Raises unless all packages can be imported.

    Raises:
        MissingExtraError: one is not there; names it, and the extra to install.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingExtraError(
            f"expected the package {missing[0]}, which is not installed; "
            f"run: pip install 'fedkseed-kernels[{extra}]'"
        )

"""Parts of pages that are made from committed results, between two marks."""

from __future__ import annotations

END = "<!-- end -->"


def with_part(page: str, mark: str, part: str) -> str:
    """The page with everything between the mark and the next `END` replaced by a part.

    Raises:
        ValueError: a page without the marks.
    """
    before, found, rest = page.partition(mark)
    _, end, after = rest.partition(END)
    if not found or not end:
        raise ValueError(f"expected a page with {mark} and {END}, got one without")
    return f"{before}{mark}\n\n{part}\n\n{END}{after}"

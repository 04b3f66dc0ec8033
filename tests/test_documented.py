"""Fields' help texts out of docstrings."""

from __future__ import annotations

import dataclasses

from fedkseed._documented import attributes_of


class Base:
    """A thing.

    Attributes:
        lr: learning rate; a text of
            two lines: it has a colon, too.
        low, high: bounds of the range.

    Raises:
        ValueError: not an attribute.
    """


class Derived(Base):
    """Another one.

    Attributes:
        lr: learning rate of this one.
        seed: base seed.
    """


@dataclasses.dataclass
class Undocumented(Base):
    lr: float = 1.0


def test_the_attributes_of_a_class_are_one_line_each() -> None:
    assert attributes_of(Base) == {
        "lr": "learning rate; a text of two lines: it has a colon, too.",
        "low": "bounds of the range.",
        "high": "bounds of the range.",
    }


def test_a_class_has_the_attributes_of_its_base_and_its_own_text_wins() -> None:
    found = attributes_of(Derived)
    assert list(found) == ["lr", "low", "high", "seed"]
    assert found["lr"] == "learning rate of this one."


def test_a_class_without_a_section_has_those_of_its_base_alone() -> None:
    assert attributes_of(Undocumented) == attributes_of(Base)
    assert attributes_of(int) == {}

"""The settings that methods beside FedKSeed have, each declared once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from fedkseed._checks import check_count

#: "fedkseed": seeds and scalars (with --sampling pro: FedKSeed-Pro). Federations where weights travel:
#: "fedavg" (first order, all weights), "fedit" (first order, LoRA adapters), "fedzo" (zeroth order, all
#: weights). No federation, on the batches that the clients of each round would take: "first-order",
#: "zeroth-order".
Method = Literal["fedkseed", "fedavg", "fedit", "fedzo", "first-order", "zeroth-order"]
FEDERATED: tuple[Method, ...] = ("fedkseed", "fedavg", "fedit", "fedzo")
FIRST_ORDER: tuple[Method, ...] = ("fedavg", "fedit", "first-order")
SEVERAL_DIRECTIONS: tuple[Method, ...] = ("fedzo", "zeroth-order")

#: Learning rates of first-order methods where none is given: of "fedit" that of Natural Instructions in
#: github.com/zhenqincn/FedHDS at commit 7a243cc; the others suit SmolLM2-135M. Zeroth-order methods take that
#: of the data, as "fedkseed" does.
LEARNING_RATES: Mapping[Method, float] = {"fedavg": 3e-3, "fedit": 3e-4, "first-order": 1e-5}

#: torch's optimizers by the names that settings have for them.
FirstOrder = Literal["auto", "sgd", "adam", "adamw"]
_OF_METHOD: Mapping[Method, str] = {"fedavg": "sgd", "fedit": "adam", "first-order": "adamw"}


@dataclass(frozen=True, kw_only=True)
class BaselineSettings:
    """How a run tunes that is not FedKSeed's, or does so over epochs; other methods leave unused ones alone.

    Attributes:
        method: fedkseed, or what it is compared with: fedavg and fedzo exchange all weights, fedit LoRA
            adapters; first-order and zeroth-order tune centrally on the clients' batches.
        optimizer: of first-order methods; auto: sgd of fedavg, adam of fedit, adamw of first-order.
        local_epochs: passes over a client's rows in a round in place of local steps; 0: local steps. Not of
            fedkseed.
        directions: of a step of fedzo and zeroth-order, on one batch.
        lora_rank: of fedit's adapters.
        lora_alpha: scale of fedit's adapters, times the rank.
        lora_dropout: of the inputs of fedit's adapters.

    Raises:
        TypeError, ValueError: a field of another type or out of range, or one that the method has no use for:
            epochs of fedkseed, an optimizer or directions.
    """

    method: Method = "fedkseed"
    optimizer: FirstOrder = "auto"
    local_epochs: int = 0
    directions: int = 1
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.05

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("method", self.method, get_args(Method)),
            ("optimizer", self.optimizer, get_args(FirstOrder)),
        ):
            if value not in choices:
                raise ValueError(f"expected a {name} out of {list(choices)}, got {value!r}")
        check_count("local_epochs", self.local_epochs, 0, 2**15)
        check_count("directions", self.directions, 1, 2**15)
        check_count("lora_rank", self.lora_rank, 1, 2**15)
        if not 0 < self.lora_alpha < 1e6:
            raise ValueError(f"expected lora_alpha above 0, got {self.lora_alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"expected lora_dropout in [0, 1), got {self.lora_dropout}")
        if self.optimizer != "auto" and self.method not in FIRST_ORDER:
            raise ValueError(
                f"expected optimizer auto with method {self.method}, got {self.optimizer}: it takes no "
                f"gradients; it is a setting of {', '.join(FIRST_ORDER)}"
            )
        if self.directions > 1 and self.method not in SEVERAL_DIRECTIONS:
            raise ValueError(
                f"expected directions 1 with method {self.method}, got {self.directions}: it is a setting of "
                f"{' and '.join(SEVERAL_DIRECTIONS)}"
            )
        if self.local_epochs and self.method == "fedkseed":
            raise ValueError(
                f"expected local_epochs 0 with method fedkseed, got {self.local_epochs}: a server draws a "
                "schedule of num_local_steps seeds"
            )

    @property
    def first_order_optimizer(self) -> str:
        """The optimizer of the method, if it takes gradients."""
        return _OF_METHOD[self.method] if self.optimizer == "auto" else self.optimizer

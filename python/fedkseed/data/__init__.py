"""Models and data: fetching with hash checks, instruction tasks, prompts and batches."""

from __future__ import annotations

from fedkseed.data.errors import DataError
from fedkseed.data.fetch import FetchError
from fedkseed.data.instructions import Example, Task, load_instruction_tasks
from fedkseed.data.models import ModelError, load_causal_lm, load_causal_lm_weights, load_smollm2

__all__ = [
    "DataError",
    "Example",
    "FetchError",
    "ModelError",
    "Task",
    "load_causal_lm",
    "load_causal_lm_weights",
    "load_instruction_tasks",
    "load_smollm2",
]

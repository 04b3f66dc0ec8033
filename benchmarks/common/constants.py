"""Numbers that several questions share."""

from __future__ import annotations

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

#: Hyperparameters of a local step in the FedKSeed paper's runs; their values do not change any timing.
ZO_EPS = 5e-4
LEARNING_RATE = 3e-7

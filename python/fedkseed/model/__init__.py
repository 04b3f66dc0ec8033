"""A model as its parameters: their order, their identity, a copy to work on."""

from __future__ import annotations

from fedkseed.model.identity import IdentityError, ModelIdentity
from fedkseed.model.manifest import Manifest, manifest_parameters
from fedkseed.model.round_model_file import RoundModelFile
from fedkseed.model.working_copy import WorkingCopy

__all__ = [
    "IdentityError",
    "Manifest",
    "ModelIdentity",
    "RoundModelFile",
    "WorkingCopy",
    "manifest_parameters",
]

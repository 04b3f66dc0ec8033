"""A process that holds a model and its kernels between the messages of a federation.

Frameworks that start a process for every message would load and rebuild the model for every message:

    reply = connect(make_client).handle(message)
"""

from __future__ import annotations

from fedkseed.resident.connection import Resident, connect
from fedkseed.resident.frames import ResidentError

__all__ = ["Resident", "ResidentError", "connect"]

"""What a Flower message holds: one ConfigRecord with one value, a message's bytes or a client's number."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fedkseed._extras import require_extra
from fedkseed.federation import EvaluationSummary, RoundSummary

require_extra("flower", "flwr")

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode

logger = logging.getLogger("fedkseed")

_RECORD, _KEY = "fedkseed", "message"


def content(value: bytes | int) -> RecordDict:
    """The content of a message."""
    return RecordDict({_RECORD: ConfigRecord({_KEY: value})})


def value(message: Message) -> Any:
    """What a message holds; of any type, None if it is not one of ours."""
    record = message.content.config_records.get(_RECORD) if message.has_content() else None
    return None if record is None else record.get(_KEY)


def metrics(summary: RoundSummary | EvaluationSummary | None) -> MetricRecord | None:
    """What a round or an evaluation came to, if it was complete, for Flower's own report."""
    return None if summary is None else MetricRecord({**summary.metrics()})


def answers(sent: Mapping[int, Message], replies: Iterable[Message]) -> Iterator[tuple[int, Any]]:
    """Addressee and value of each reply, in their order; None for an error of the client, which is logged.

    So is an error of Flower's own, as of a node that is away for a while; it is no answer.

    Args:
        sent: by addressee. A reply is told by the message that it answers: of a node that was lost, Flower
            itself replies, in its own name.
        replies: to them.
    """
    addressees = {message.metadata.message_id: to for to, message in sent.items()}
    for reply in replies:
        to = addressees[reply.metadata.reply_to_message_id]
        if reply.has_error():
            logger.warning("no answer of %d: %.80r", to, reply.error.reason)
            if reply.error.code != ErrorCode.CLIENT_APP_RAISED_EXCEPTION:
                continue
        yield to, value(reply)

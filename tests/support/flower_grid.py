"""Flower's Grid without its processes: messages go through its serialisation straight to a ClientApp.

What it touches of Flower's inside (the identity of a task, the id of a message, Protobuf) stands here alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

RUN_ID = 11


class DirectGrid(Grid):
    """Nodes in this process; tests change what stands below.

    Attributes:
        numbers: client by node, of the nodes that are there.
        mute: clients that do not say who they are; away: clients of which Flower itself says so.
        silent: clients that never answer; broken: clients whose messages Flower itself answers.
        falsified: what becomes of the content of a client's reply.
        run_config: of the run.
        seen: (client, type) of the messages that were sent, in order.
        records: contents of all messages and replies; down, up: they as they travel.
        replies: content of the last reply of each client.
        sizes: serialised content of each message and its reply, in bytes, by type.
    """

    def __init__(self, app: ClientApp, num_nodes: int) -> None:
        self.app = app
        self.numbers: dict[int, int | None] = {90 - 7 * number: number for number in range(num_nodes)}
        self.mute: set[int] = set()
        self.away: set[int] = set()
        self.silent: set[int] = set()
        self.broken: set[int] = set()
        self.seen: list[tuple[int | None, str]] = []
        self.sizes: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self.falsified: Callable[[RecordDict, int | None], RecordDict] = lambda record, number: record
        self.run_config: dict[str, bool | float | int | str] = {}
        self.records: list[RecordDict] = []
        self.down: list[bytes] = []
        self.up: list[bytes] = []
        self.replies: dict[int | None, bytes] = {}
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, 1, 1

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """The last one is answered first."""
        sent = list(messages)
        for message in sent:
            message.metadata.__dict__["_message_id"] = f"message {len(self.seen)}"
            self.seen.append((self.numbers[message.metadata.dst_node_id], message.metadata.message_type))
        return [reply for message in reversed(sent) for reply in self._answers(message)]

    def _answers(self, message: Message) -> Iterable[Message]:
        node = message.metadata.dst_node_id
        number = self.numbers[node]
        if number in (self.mute if message.metadata.message_type == "query" else self.silent):
            return []
        if number in (self.away if message.metadata.message_type == "query" else self.broken):
            reply = Message(Error(ErrorCode.NODE_UNAVAILABLE, "Node Unavailable"), reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = 1
            return [reply]
        config = {} if number is None else {"partition-id": number, "num-partitions": len(self.numbers)}
        down = message_to_proto(message)
        context = Context(RUN_ID, node, config, RecordDict(), self.run_config)
        reply = self.app(message_from_proto(down), context)
        if reply.has_content():
            self.records += [message.content, reply.content]
            if message.metadata.message_type == "train":
                self.replies[number] = reply.content.config_records["fedkseed"]["message"]
                reply.content = self.falsified(reply.content, number)
        up = message_to_proto(reply)
        self.down.append(down.SerializeToString())
        self.up.append(up.SerializeToString())
        self.sizes[message.metadata.message_type].append((down.content.ByteSize(), up.content.ByteSize()))
        return [message_from_proto(up)]

    def get_node_ids(self) -> Iterable[int]:
        return list(self.numbers)

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

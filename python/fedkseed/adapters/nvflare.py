"""A federation over NVIDIA FLARE's Collab API: one message a site and round, bytes there and bytes back.

A job is a module with two functions: `client_side` makes what its sites run, `server_side` its server's.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

from fedkseed._extras import require_extra
from fedkseed.federation.bounds import RECOMMENDED_BOUNDS, Bounds
from fedkseed.federation.client import Client, check_made_client
from fedkseed.federation.evaluation_round import EvaluationRound
from fedkseed.federation.messages import Broadcast, MessageError, ProtocolError
from fedkseed.federation.round import Round
from fedkseed.federation.server import Server, check_made_server
from fedkseed.federation.summary import RoundSummary
from fedkseed.model.identity import IdentityError

logger = logging.getLogger("fedkseed")

OpenT = TypeVar("OpenT", Round, EvaluationRound)
#: Errors whose texts hold numbers of messages, models and limits, and no data.
_TELLING = (MessageError, ProtocolError, IdentityError)
_SITE_NAME = re.compile(r"site-([1-9][0-9]{0,9})")


class SiteError(RuntimeError):
    """A site could not answer; its text is what may leave the site."""


def client_side(make_client: Callable[[int], Client[Any]]) -> Callable[[bytes], bytes]:
    """A job's function that answers messages at the sites; its module must call it ``handle``.

    What goes wrong is logged at the site; the server gets one line, of other errors than the protocol's only
    the type.

    Args:
        make_client: makes the client of that number, at the first message to a process.

    Raises:
        MissingExtraError: NVIDIA FLARE is not installed.
    """
    require_extra("nvflare", "nvflare")
    from nvflare.collab import collab

    made: list[Client[Any]] = []
    lock = threading.Lock()

    def handle(message: bytes) -> bytes:
        try:
            with lock:
                if not made:  # from a message that is undamaged, or another's client would stay
                    made.append(check_made_client(make_client(Broadcast.from_bytes(message).client)))
            return made[0].handle(message)
        except Exception as error:
            logger.exception("a message was not answered")
            text = f": {error}" if isinstance(error, _TELLING) else ""
            raise SiteError(f"{type(error).__name__}{text}") from None

    return collab.publish(handle)  # type: ignore[no-any-return]


def server_side(
    make_server: Callable[[], Server],
    num_rounds: int,
    *,
    timeout: float,
    ledger: str | Path | None = None,
    sites: Sequence[str] | None = None,
    min_replies: int = 1,
    bounds: Bounds = RECOMMENDED_BOUNDS,
    evaluate_every: int = 0,
    on_round: Callable[[Server, RoundSummary], None] | None = None,
) -> Callable[[], None]:
    """A job's function that runs the rounds at FLARE's server.

    Args:
        make_server: makes the server, or resumes one, in FLARE's server process.
        num_rounds: rounds in all, those before a resume among them.
        timeout: seconds for a site's answer; before its first one it makes its client.
        ledger: file of the ledger in the end; in the folder of the job's result unless absolute.
        sites: names of the sites, client 0 first; None for FLARE's own: site-1, site-2, ...
        min_replies: a round, or an evaluation, with fewer ends the job; beyond a round's clients: ValueError.
        bounds: put in where the server's config has none; ``Bounds(0, 0)`` for none.
        evaluate_every: the sites evaluate the model before each so many rounds; 0 for never.
        on_round: called after each round, to log what it came to or to save the server.

    Raises:
        MissingExtraError: NVIDIA FLARE is not installed.
    """
    require_extra("nvflare", "nvflare")
    from nvflare.collab import collab

    def run() -> None:
        server, proxies = check_made_server(make_server()), numbered(collab.clients, sites)
        server.put_bounds(bounds)
        server.config.check_min_replies(min_replies, len(proxies))
        while server.round < num_rounds:
            if evaluate_every and server.round % evaluate_every == 0:
                evaluation = exchange(server.open_evaluation(proxies), proxies, timeout)
                logger.info("evaluation: %s", evaluation.close(min_replies).metrics())
            summary = exchange(server.open(proxies), proxies, timeout).close(min_replies)
            logger.info("round: %s", summary.metrics())
            if on_round is not None:
                on_round(server, summary)
        if ledger is not None:
            server.ledger().save(Path(collab.workspace.get_run_dir(collab.fl_ctx.get_job_id())) / ledger)

    return collab.main(run)  # type: ignore[no-any-return]


def numbered(proxies: Iterable[Any], sites: Sequence[str] | None) -> dict[int, Any]:
    """FLARE's proxies of the sites, by the numbers of their clients; a site without one is a ValueError."""
    found = {}
    for proxy in proxies:
        if sites is not None and proxy.name in sites:
            found[sites.index(proxy.name)] = proxy
        elif sites is None and (match := _SITE_NAME.fullmatch(proxy.name)):
            found[int(match[1]) - 1] = proxy
        else:
            raise ValueError(f"expected a site out of {sites or 'site-1, site-2, ...'}, got {proxy.name!r}")
    return found


def exchange(opened: OpenT, proxies: Mapping[int, Any], timeout: float) -> OpenT:
    """Sends each message, all side by side, and adds the replies; a site that fails is logged and missing."""
    require_extra("nvflare", "nvflare")
    from nvflare.collab import CollabCallError

    with ThreadPoolExecutor(max_workers=len(opened.clients)) as threads:
        calls = {
            threads.submit(proxies[client](timeout=timeout).handle, message): client
            for client, message in opened.messages.items()
        }
        for call in as_completed(calls):
            try:
                opened.add(calls[call], call.result())
            except CollabCallError as error:
                told = repr(str(error))[:200]  # a site's text, on one line
                logger.warning("round %d: client %d failed: %s", opened.number, calls[call], told)
            except (MessageError, ProtocolError):
                pass  # logged where it was refused
    return opened

"""Refuses again what was refused a moment ago, from its bytes alone.

Who is told to try again sends the same request again, and beside a full queue there may be a thousand of
them a second. The first goes the whole way: parser, limits, `Host`, `Origin`, key, places. All of it but the
places depends on the headers and on who sends them. So for the same headers of the same sender only the
places are looked at again: no parser, no task and no app runs for it, and its body is not looked at.
"""

import uuid
from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum, auto
from http import HTTPStatus
from typing import Final

from gpt2core.serve import logs
from gpt2core.serve.driver import Driver
from gpt2core.serve.errors import Refusal, json_text
from gpt2core.serve.metrics import Metrics
from gpt2core.serve.state import Client, RequestState

END: Final = b"\r\n\r\n"
MOST_NBYTES: Final = 16 * 1024
"""Of a request; a larger one goes the whole way each time."""
MOST_HEADS: Final = 1024
MOST_HEAD_NBYTES: Final = 4 * 1024


class Hold(Enum):
    """Not an answer."""

    UNTIL_COMPLETE = auto()


@dataclass(frozen=True, slots=True)
class Asked:
    """What is known of a request by its headers."""

    path: str
    client: Client
    request_id: str | None  # that the client gave
    nbytes: int  # with the body
    lines: bytes  # of the answer, for this client alone
    closes: bool  # whether the connection ends with the answer


class Doorkeeper:
    """Remembers refused requests by their sender and their headers. Belongs to the event loop."""

    def __init__(self, driver: Driver, metrics: Metrics) -> None:
        self._driver = driver
        self._metrics = metrics
        self._asked: OrderedDict[tuple[str, bytes], Asked] = OrderedDict()
        self._spelled: dict[str, tuple[bytes, bytes]] = {}  # by message

    def remember(self, sender: str, data: bytes, state: RequestState, path: str, *, closes: bool) -> None:
        """Note a request that the guard has refused for want of a place.

        Args:
            sender: the address at the other end of the connection, which may be a proxy's.
            data: all that came of the request, and nothing else.
        """
        head, end, body = data.partition(END)
        if state.refused_with is None or not end or len(head) > MOST_HEAD_NBYTES:
            return
        if state.body_nbytes != len(body):  # chunked, or with the next request behind it
            return
        lines = b"".join(b"%s: %s\r\n" % line for line in state.refused_with)
        if closes:
            lines += b"connection: close\r\n"
        given = state.request_id if state.has_given_id else None
        asked = Asked(path, state.client, given, len(data), lines, closes)
        self._asked[sender, head] = asked
        self._asked.move_to_end((sender, head))
        if len(self._asked) > MOST_HEADS:
            self._asked.popitem(last=False)

    def answer(self, sender: str, data: bytes) -> tuple[bytes, bool] | Hold | None:
        """The refusal of what came, and whether the connection ends with it.

        None: it is not known or may have a place, so it has to go the whole way.
        """
        places = self._driver.places
        if not self._asked or places is None or self._driver.state != "ready":
            return None
        head = data[: data.find(END)]
        asked = self._asked.get((sender, head))
        if asked is None or len(data) > asked.nbytes:
            return None
        refusal = places.refuse(asked.client)
        if refusal is None:
            return None
        if len(data) < asked.nbytes:
            return Hold.UNTIL_COMPLETE
        places.count_refusal(asked.client)
        self._metrics.count_request("POST", asked.path, refusal.status, 0.0)
        request_id = asked.request_id or uuid.uuid4().hex
        logs.event("debug", "request", request_id=request_id, route=asked.path, status=refusal.status)
        begin, body = self._spell(refusal)
        return b"%sx-request-id: %s\r\n%s\r\n%s" % (
            begin,
            request_id.encode(),
            asked.lines,
            body,
        ), asked.closes

    def _spell(self, refusal: Refusal) -> tuple[bytes, bytes]:
        """Its first lines, and its body; kept, since the same few come again and again."""
        known = self._spelled.get(refusal.message)
        if known is None:
            if len(self._spelled) >= MOST_HEADS:
                self._spelled.clear()
            body = json_text(refusal.body)
            head = f"HTTP/1.1 {refusal.status} {HTTPStatus(refusal.status).phrase}\r\n"
            lines = {**refusal.headers, "Content-Type": "application/json", "Content-Length": str(len(body))}
            head += "".join(f"{name}: {value}\r\n".lower() for name, value in lines.items())
            known = self._spelled[refusal.message] = head.encode(), body
        return known

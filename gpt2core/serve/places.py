"""Who holds how many places: texts that run or wait, in all and of one client, both bounded.

Belongs to the event loop.
"""

from collections import Counter

from gpt2core.serve.errors import Refusal
from gpt2core.serve.state import Client


class Places:
    """`most` places, of which one client may hold `share` while it asks for more.

    A client that holds none may take what its one request needs, also beyond its share; what it holds beyond
    the share takes nothing from the others.
    """

    def __init__(self, most: int, *, running: int, share: float) -> None:
        self.used = 0
        self._most = most
        self._queue = most - running
        self._share = max(1, int(share * most))
        self._shared = 0  # the sum of what each client holds, up to its share
        self._held: Counter[Client] = Counter()
        self._refused: Counter[Client] = Counter()

    def refuse(self, client: Client, count: int = 1) -> Refusal | None:
        """Why a client cannot have `count` places more; None if it can."""
        held = self._held.get(client, 0)
        if self._shared and self._shared + count > self._most:
            return _too_many(
                "queue_full", f"the queue of {self._queue} texts is full; try again a little later"
            )
        if client.address is not None and held and held + count > self._share:
            return _too_many(
                "client_queue_full",
                f"this client's requests hold {held} of the {self._share} places that one client may hold; "
                "try again when some are done",
            )
        return None

    def take(self, client: Client, count: int) -> None:
        """Give a client places, once `refuse` has said None; a negative `count` gives them back."""
        before = self._held[client]
        self._held[client] += count
        self.used += count
        if client.address is None:
            self._shared += count
        else:
            self._shared += min(before + count, self._share) - min(before, self._share)
        if not self._held[client]:
            del self._held[client]

    def count_refusal(self, client: Client) -> None:
        """Note that a client was turned away: a line of the log for each would cost more than the refusal."""
        self._refused[client] += 1

    def pop_refusals(self) -> tuple[int, int]:
        """How many requests were turned away since the last call, and of how many clients."""
        counts = self._refused.total(), len(self._refused)
        self._refused.clear()
        return counts


def _too_many(code: str, message: str) -> Refusal:
    return Refusal(429, "rate_limit_error", code, message, headers={"Retry-After": "1"})

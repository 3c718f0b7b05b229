"""What was asked in a gateway's calls of the last minutes: a response is judged with the request it answers."""

import sys
import time
from collections import OrderedDict

from gvl_jax.serve.wire import Ask

SECONDS = 600
BYTES = 64 * 2**20  # kept of all calls together, pictures included


class Calls:
    """Requests by call id, the newest kept."""

    def __init__(self) -> None:
        self.kept: OrderedDict[str, tuple[float, Ask]] = OrderedDict()
        self.size = 0

    def put(self, call: str, ask: Ask) -> None:
        self._drop(call)
        self.kept[call] = (time.monotonic(), ask)
        self.size += _size(call, ask)
        while self.kept and (self.size > BYTES or self.get(next(iter(self.kept))) is None):
            self._drop(next(iter(self.kept)))

    def get(self, call: str) -> Ask | None:
        """None: unknown, or too long ago."""
        since, ask = self.kept.get(call, (0.0, None))
        return ask if time.monotonic() - since <= SECONDS else None

    def _drop(self, call: str) -> None:
        if call in self.kept:
            self.size -= _size(call, self.kept.pop(call)[1])


def _size(call: str, ask: Ask) -> int:
    return 1000 + sum(map(sys.getsizeof, (call, ask.request, ask.response, *ask.images)))

"""Connections that must ask soon, and of which there is a bounded number."""

from __future__ import annotations

from asyncio import TimerHandle, Transport
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

ASKING = 10.0  # seconds within which a request must have come whole
MOST = 48  # connections; beyond them the one that has waited longest without asking is closed


class Connection(H11Protocol):
    """One connection: closed when it does not ask, or when others need its place.

    Connections that are opened and left half-asked cannot keep the owner out: each has `ASKING`
    seconds for a request, however slowly it comes, and a new one takes the place of the oldest of
    them. One that is being answered is left alone, as long as the events of a page last.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.opened = self.loop.time()
        self._limit: TimerHandle | None = None

    @property
    def is_asking(self) -> bool:
        """Whether no request of it is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: Transport) -> None:
        """Take the place of another one if there are too many."""
        super().connection_made(transport)
        self._set_limit()
        if len(self.connections) > MOST:
            asking = [c for c in self.connections if isinstance(c, Connection) and c.is_asking]
            min(asking, key=lambda c: c.opened).close()

    def data_received(self, data: bytes) -> None:
        """Read on; the time limit ends with a whole request."""
        super().data_received(data)
        self._set_limit()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP and end; a request before it gets no answer any more.

        Bytes that spoil a connection may come while its last request is being answered.
        """
        unanswered = self.cycle is None or not self.cycle.response_started
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if unanswered and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.close()

    def on_response_complete(self) -> None:
        """The next request has its own time."""
        super().on_response_complete()
        self._set_limit()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the time limit."""
        self._drop_limit()
        super().connection_lost(exc)

    def close(self) -> None:
        """End at once, without what is still unsent."""
        self.transport.abort()

    def _set_limit(self) -> None:
        if not self.is_asking:
            self._drop_limit()
        elif self._limit is None:
            self._limit = self.loop.call_later(ASKING, self.close)

    def _drop_limit(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

"""Bound the number of connections and the time to send a request."""

from __future__ import annotations

from asyncio import TimerHandle, Transport
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_SECONDS = 10.0  # seconds to send a complete request
MAX_CONNECTIONS = 48  # connections; beyond them the longest idle one is closed


class Connection(H11Protocol):
    """A connection, closed if it is slow to send a request or its place is needed.

    Half-open connections cannot lock the owner out: each has `REQUEST_SECONDS` for a request,
    and a new one replaces the oldest of them. Connections being answered, such as event streams,
    are kept.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.opened = self.loop.time()
        self._limit: TimerHandle | None = None

    @property
    def is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: Transport) -> None:
        """Close the oldest idle connection if there are too many."""
        super().connection_made(transport)
        self._set_limit()
        if len(self.connections) > MAX_CONNECTIONS:
            idle = [c for c in self.connections if isinstance(c, Connection) and c.is_idle]
            min(idle, key=lambda c: c.opened).close()

    def data_received(self, data: bytes) -> None:
        """Read data; a complete request ends the time limit."""
        super().data_received(data)
        self._set_limit()

    def send_400_response(self, msg: str) -> None:
        """Answer malformed HTTP and close; pending requests are dropped.

        Malformed bytes may arrive while the last request is being answered.
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
        """Restart the time limit for the next request."""
        super().on_response_complete()
        self._set_limit()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the time limit."""
        self._drop_limit()
        super().connection_lost(exc)

    def close(self) -> None:
        """Close immediately, discarding unsent data."""
        self.transport.abort()

    def _set_limit(self) -> None:
        if not self.is_idle:
            self._drop_limit()
        elif self._limit is None:
            self._limit = self.loop.call_later(REQUEST_SECONDS, self.close)

    def _drop_limit(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

"""Access control: exact hosts, two methods, a key; everything else is refused."""

from __future__ import annotations

import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse, RedirectResponse, Response

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

HOST = re.compile(r"(\[[0-9a-f:.]+\]|[0-9a-z.-]+)(?::\d{1,5})?", re.IGNORECASE)
HEADERS = (
    (
        "content-security-policy",
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
        "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'",
    ),
    ("x-content-type-options", "nosniff"),
    ("x-frame-options", "DENY"),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-resource-policy", "same-origin"),
    ("cross-origin-opener-policy", "same-origin"),
    ("cache-control", "no-store"),
)


class Access:
    """The key of a server: a token in the printed address, then a cookie.

    The token is valid until the server ends, so that link previews cannot use it up. The cookie
    has a random name, as browsers send it to every port of a host.
    """

    def __init__(self) -> None:
        self.token = secrets.token_urlsafe(24)
        self.name = f"tikhon_live_{secrets.token_hex(4)}"
        self._cookie = secrets.token_urlsafe(24)

    def exchange_token(self, token: str) -> str | None:
        """Return the cookie for a valid token, else None."""
        if not secrets.compare_digest(token.encode(), self.token.encode()):
            return None
        return self._cookie

    def is_valid_cookie(self, cookie: str) -> bool:
        """Return whether the cookie is valid."""
        return secrets.compare_digest(cookie.encode(), self._cookie.encode())


class Guard:
    """Refuse requests not from the user's own browser tab; add headers to the others."""

    def __init__(self, inner: Application, hosts: frozenset[str], access: Access) -> None:
        self.inner, self.hosts, self.access = inner, hosts, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request or pass it on."""
        if scope["type"] == "lifespan":
            return await self.inner(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        answer = self.check_request(scope) or self.inner

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                names = {name for name, _ in HEADERS}
                own = [h for h in message.get("headers", ()) if h[0].decode().lower() not in names]
                message["headers"] = [*own, *((k.encode(), v.encode()) for k, v in HEADERS)]
            await send(message)

        await answer(scope, receive, send_with_headers)

    def check_request(self, scope: Scope) -> Response | None:
        """Return a refusal, or the redirect that sets the cookie; None if the request may pass."""
        headers = Headers(scope=scope)
        names = headers.getlist("host")
        if len(names) != 1 or not self.is_known_host(names[0]):
            return PlainTextResponse("this server answers under its own address only", 403)
        origin = headers.get("origin")
        if origin is not None and not self.is_known_host(_host_of_origin(origin)):
            return PlainTextResponse("other pages may not read this one", 403)
        if scope["method"] not in ("GET", "HEAD"):
            return PlainTextResponse("read only", 405, headers={"allow": "GET, HEAD"})
        allowed = self.access.is_valid_cookie(
            _read_cookie(headers.get("cookie", ""), self.access.name)
        )
        token = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if scope["path"] == "/" and token:
            cookie = None if allowed else self.access.exchange_token(token)
            if not allowed and cookie is None:
                return _no_key_response()
            answer = RedirectResponse("/", 303)
            if cookie is not None:
                answer.set_cookie(
                    self.access.name, cookie, httponly=True, samesite="strict", path="/"
                )
            return answer
        return None if allowed else _no_key_response()

    def is_known_host(self, host: str) -> bool:
        """Return whether a Host header names this server, ignoring the port."""
        found = HOST.fullmatch(host)
        return found is not None and found[1].lower() in self.hosts


def _host_of_origin(origin: str) -> str:
    """Return the host of an Origin header, or "" if malformed, which matches no host."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _read_cookie(header: str, name: str) -> str:
    try:
        found = SimpleCookie(header).get(name)
    except CookieError:
        return ""
    return found.value if found is not None else ""


def _no_key_response() -> Response:
    words = "Open the address that tikhon live printed; a new start gives a new one."
    return PlainTextResponse(words, 403)

"""The web application: five fixed addresses, no parameters, no side effects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from importlib.resources import files

from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from tikhon.live.guard import Access, Application, Guard
from tikhon.live.watched_run import WatchedRun

ASSETS = {  # address -> package, file, type
    "/page.css": ("tikhon.report", "page.css", "text/css"),
    "/plotly.js": ("tikhon.report", "plotly-cartesian.min.js", "text/javascript"),
    "/page.js": ("tikhon.report", "page.js", "text/javascript"),
    "/live.js": ("tikhon.live", "live.js", "text/javascript"),
}


def application(run: WatchedRun, access: Access, hosts: Iterable[str]) -> Application:
    """Build the application for one run.

    Args:
        run: the run to show.
        access: the key; without its cookie every address returns 403.
        hosts: the allowed names in a request's Host header, ignoring the port.
    """

    async def page(request: Request) -> Response:
        return HTMLResponse(await run_in_threadpool(run.page))

    async def events(request: Request) -> Response:
        if request.method == "HEAD":
            return Response(media_type="text/event-stream")
        return EventSourceResponse(stream_changes(run, every=1.0))

    routes = [Route("/", page), Route("/events", events)]
    routes += [Route(address, asset_endpoint(*place)) for address, place in ASSETS.items()]
    return Guard(Starlette(routes=routes), frozenset(h.lower() for h in hosts), access)


async def stream_changes(run: WatchedRun, *, every: float) -> AsyncIterator[dict[str, str]]:
    """Yield an event whenever the run's files change; slow readers get several changes at once.

    Polls `every` seconds; the data are the seconds since the run last wrote.
    """
    seen = None
    while True:
        version = await run_in_threadpool(run.version)
        if version != seen:
            seen = version
            yield {"event": "changed", "data": f"{run.age(version):.1f}"}
        await asyncio.sleep(every)


def asset_endpoint(package: str, name: str, media_type: str):
    """Return the endpoint for a fixed file."""
    content = (files(package) / "static" / name).read_bytes()

    async def endpoint(request: Request) -> Response:
        return Response(content, media_type=media_type)

    return endpoint

"""What the script in the browser asks the server for: the metadata of an adapter file, as it is now."""

from __future__ import annotations

from aiohttp import web
from server import PromptServer

from . import files

PATH = "/wadi/lorad"


def register() -> None:
    """Add the address to ComfyUI's server; a second time, or where no server runs, it does nothing."""
    server = getattr(PromptServer, "instance", None)
    if server is not None and not any(getattr(route, "path", None) == PATH for route in server.routes):
        server.routes.get(PATH)(lorad)


async def lorad(request: web.Request) -> web.Response:
    """``GET /wadi/lorad?name=NAME``: name, stamp and metadata; 304 if the asker has them as they are, 404 if there is none."""
    name = request.query.get("name", "")
    try:
        _, changed, size = files.stamp(name)
        stamp = f"{changed}-{size}"
        # The browser keeps an answer and asks each time whether it is still right.
        headers = {"ETag": f'"{stamp}"', "Cache-Control": "no-cache"}
        if request.headers.get("If-None-Match") == headers["ETag"]:
            return web.Response(status=304, headers=headers)
        return web.json_response({"name": name, "stamp": stamp, "metadata": files.metadata(name)}, headers=headers)
    except FileNotFoundError as error:
        return web.json_response({"error": str(error)}, status=404)
    except (OSError, ValueError) as error:
        return web.json_response({"error": str(error)}, status=422)

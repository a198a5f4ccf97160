"""Which pages of other sites may use the server from a browser: those of `--allow-origin`, and nobody else's."""

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from .api import ApiError

_EXPOSED = ("x-request-id", "x-should-retry", "retry-after")


class Cors(CORSMiddleware):
    """Answers preflights itself, so they need no key, and lets allowed pages read answers and errors.

    Every header may be sent: OpenAI's own client adds a dozen. The server has no cookies, so credentials stay out.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=("GET", "HEAD", "POST"),
            allow_headers=("*",),
            expose_headers=_EXPOSED,
            allow_private_network=True,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """Starlette's, a refusal in the shape of every other one."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        origin, method = request_headers["origin"], request_headers["access-control-request-method"]
        text = f"origin, method: must be allowed by --allow-origin, and GET, HEAD or POST; got {origin!r:.80}, {method!r:.20}"
        refusal = ApiError(403, "cors", text)
        return JSONResponse(refusal.body, refusal.status, {"Vary": response.headers["Vary"]})

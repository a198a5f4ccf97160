"""The three deployments of a server on Ray Serve: HTTP with the page, Check-in, and the replicas that draw."""

import asyncio
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

from ray import serve
from ray.exceptions import RayTaskError
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from personalq.checkin import Decision
from personalq.repository import Repository
from runtime.serving.app import create_app
from runtime.serving.drawing_process.messages import Message
from runtime.serving.drawing_process.process import DrawProcess
from runtime.serving.images import Checkin, Service
from runtime.serving.options import MEGABYTE, DrawOptions, ServeOptions
from runtime.serving.serve import start_access_log

from .cluster import Replicas
from .drawing import REPORTS, ClusterDrawing
from .routing import HolderRouter

_STATS_SECONDS = 1.0
_ROUNDED_BYTES = -8  # decimal digits: a value that changes constantly would be sent to every router constantly


class Draw:
    """One replica: a drawing process, its engines under a byte budget."""

    async def __init__(self, options: DrawOptions) -> None:
        self._drawing = DrawProcess(options, lambda _: None, lambda: None)
        await self._drawing.start()

    async def draw(self, orders: list[Message], seconds: float) -> AsyncGenerator[tuple[int, Message, bytes], None]:
        """(place in `orders`, event, PNG or nothing) until every picture is answered; the rest is cancelled with the call."""
        events: asyncio.Queue[tuple[Message, bytes]] = asyncio.Queue()
        drawings = self._drawing.submit(orders, seconds)
        for one in drawings:
            one.events = events
        places = {one.id: place for place, one in enumerate(drawings)}
        try:
            while places:
                message, blob = await events.get()
                place = places[message["id"]]
                if message["event"] in ("done", "error"):
                    del places[message["id"]]
                yield place, message, blob
        finally:
            for one in drawings:
                self._drawing.cancel(one)

    async def prefetch(self, checkpoints: list[str]) -> None:
        self._drawing.prefetch(checkpoints)

    def record_routing_stats(self) -> Message:
        """What Ray Serve hands to the routers."""
        report = self._drawing.residency
        kept = {name: report[name] for name in ("engines", "counts", "used_bytes", "budget_bytes") if name in report}
        return {**kept, "process_bytes": round(report["process_bytes"], _ROUNDED_BYTES)} if kept else {}


class CheckinReplica:
    """Check-in in a process of its own."""

    def __init__(self, options: DrawOptions) -> None:
        self._checkin = Checkin(Repository.open(options.repository))

    async def ask(self, request: str, answers: tuple[str, ...]) -> Decision:
        return await self._checkin.ask(request, answers)


class Ingress:
    """The HTTP interface and the page of `personalq serve`; other deployments draw and run Check-in."""

    def __init__(self, options: ServeOptions, draw: DeploymentHandle, checkin: DeploymentHandle) -> None:
        start_access_log()
        self._options, self._draw, self._checkin = options, draw, checkin

    def __serve_build_asgi_app__(self) -> Any:  # Ray Serve's name
        return create_app(
            self._options, Service(self._options, partial(ClusterDrawing, self._draw, REPORTS), self._ask)
        )

    async def _ask(self, request: str, answers: tuple[str, ...]) -> Decision:
        try:
            decision: Decision = await self._checkin.ask.remote(request, answers)
        except RayTaskError as error:
            raise error.cause from None
        return decision


def application(options: ServeOptions, replicas: Replicas, router: type = HolderRouter) -> serve.Application:
    """What `serve.run` takes. router: decides which replica draws."""
    quiet = {"enable_access_log": False}  # the ingress writes its own
    draw = serve.deployment(Draw, name="draw").options(
        **scaling(replicas, options.draw.max_batch),
        max_ongoing_requests=2 * options.draw.max_batch,  # one batch being drawn, and the next one
        request_router_config=RequestRouterConfig(
            request_router_class=router, request_routing_stats_period_s=_STATS_SECONDS
        ),
        ray_actor_options={
            "num_cpus": replicas.threads,
            "num_gpus": replicas.gpus,
            "memory": round(options.draw.budget_mb * MEGABYTE),
        },
        graceful_shutdown_timeout_s=options.limits.seconds,
        logging_config=quiet,
    )
    light = {"ray_actor_options": {"num_cpus": 0}, "max_ongoing_requests": 1000, "logging_config": quiet}
    checkin = serve.deployment(CheckinReplica, name="checkin").options(**light)
    # One ingress: it counts the queue, and keeps the pictures that were answered as URLs.
    ingress = serve.deployment(serve.ingress()(Ingress), name="ingress").options(
        **light, graceful_shutdown_timeout_s=options.limits.seconds
    )
    return ingress.bind(options, draw.bind(options.draw), checkin.bind(options.draw))


def scaling(replicas: Replicas, max_batch: int) -> dict[str, Any]:
    """A fixed number of replicas, or Ray Serve's autoscaling between two limits, aiming at about one batch per replica."""
    if replicas.most <= replicas.least:
        return {"num_replicas": replicas.least}
    return {
        "autoscaling_config": {
            "min_replicas": replicas.least,
            "initial_replicas": replicas.least,
            "max_replicas": replicas.most,
            "target_ongoing_requests": max_batch,
        }
    }

"""`personalq serve --on ray`: start the deployments, wait for a signal, end them."""

import signal
import sys
import threading

from personalq.errors import FleetError
from personalq.repository import Repository
from personalq.repository.remote import Remote
from runtime.cache import take_cards
from runtime.serving.options import MEGABYTE, ServeOptions

from .cluster import Needs, Replicas, connect, ray_module, warn_misfit

NAME = "personalq"


def serve_on_ray(options: ServeOptions, replicas: Replicas, address: str) -> None:
    """Serve until SIGTERM or SIGINT; returns when what was begun is answered.

    Raises MissingExtraError without Ray Serve, FleetError when nothing answers at the address or Serve runs already.
    """
    ray = ray_module()
    is_ours = connect(ray, address)
    from ray import serve

    from .deployments import application

    told = threading.Event()
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, lambda *_: told.set())
    try:
        if options.draw.store:
            take_cards(Repository.open(options.draw.repository), Remote(options.draw.store))
        serve.start(proxy_location="HeadOnly", http_options={"host": options.host, "port": options.port})
        if NAME in serve.status().applications:
            raise FleetError(
                f"--address {address or 'auto'}: this cluster serves a '{NAME}' already; stop that one first"
            )
        needs = Needs(replicas.threads, replicas.gpus, round(options.draw.budget_mb * MEGABYTE))
        warn_misfit(ray, needs, "replica", "--budget-mb")
        serve.run(application(options, replicas), name=NAME)
        print(f"personalq: http://{options.host}:{options.port}", file=sys.stderr, flush=True)
        told.wait()
        serve.delete(NAME)
    finally:
        if is_ours:
            serve.shutdown()
            ray.shutdown()

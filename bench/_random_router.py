"""What routing by held engines is compared with: any replica, whatever it holds."""

import random
from typing import Any

from fleet.routing import HolderRouter


class RandomRouter(HolderRouter):
    """A replica at random first; the others when its queue is full. Ray Serve copies this module to where it routes."""

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        order = random.sample(candidate_replicas, len(candidate_replicas))
        return [order[:1], order[1:]]

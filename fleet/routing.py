"""Which replica draws a picture: one that holds the checkpoint's engine, unless others have much less to do.

A request names its checkpoint as Ray Serve's multiplexed model id. What replicas hold comes with their routing stats,
about a second old; what was sent since then is remembered here. Ray Serve copies this module into the routing
process, so whatever other code reads there must be in another module (drawing.REPORTS).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray.serve.request_router import (
    FIFOMixin,
    MultiplexMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from . import drawing

SLACK = 2  # requests: a holder is preferred while its queue is at most this much longer than the shortest
_REMEMBERED_S = 30.0  # how long a requested engine may load before its replica must have reported it


@dataclass(frozen=True)
class Seen:
    """A replica as the router sees it. held: checkpoints with an engine in memory or on its way; queue: its requests."""

    id: str
    held: frozenset[str]
    queue: int


def ranked(checkpoint: str, replicas: Sequence[Seen]) -> list[list[str]]:
    """Ids of the replicas to try first, and of the others.

    First are the holders, when they need not be waited for too long; else the replica with the shortest queue, and of equal
    ones that with the fewest checkpoints, which will load the engine.
    """
    shortest = min(one.queue for one in replicas)
    by_load = sorted(replicas, key=lambda one: (one.queue, len(one.held)))
    first = [one for one in by_load if checkpoint in one.held and one.queue <= shortest + SLACK] or by_load[:1]
    return [[one.id for one in first], [one.id for one in by_load if one not in first]]


class HolderRouter(FIFOMixin, MultiplexMixin, RequestRouter):
    """Ray Serve asks it for every request; of the first replicas that it names, the one with the shortest queue is taken.

    The mixins give a replica that was found to the oldest request for the same checkpoint. Without them Ray 2.60 goes by
    an id that all calls of one HTTP request share, and never finds a replica for the second of them.
    """

    def initialize_state(self, **_: Any) -> None:
        self._sent: dict[str, tuple[str, float]] = {}

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        reports = {one.replica_id.unique_id: one.routing_stats for one in replicas if one.routing_stats}
        drawing.REPORTS.update(reports)
        for gone in drawing.REPORTS.keys() - {one.replica_id.unique_id for one in replicas}:
            del drawing.REPORTS[gone]
        super().update_replicas(replicas)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        checkpoint = pending_request.metadata.multiplexed_model_id if pending_request else ""
        if not checkpoint or not candidate_replicas:
            return [candidate_replicas]
        by_id = {one.replica_id.unique_id: one for one in candidate_replicas}
        seen = [self._seen(one) for one in candidate_replicas]
        first, others = ranked(checkpoint, seen)
        if not any(checkpoint in one.held for one in seen):
            self._note(checkpoint, first[0])  # at once: a second request may come before this one arrives there
        return [[by_id[one] for one in ids] for ids in (first, others)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self._note(pending_request.metadata.multiplexed_model_id, replica_id.unique_id)

    def _note(self, checkpoint: str, replica: str) -> None:
        """Remember what was sent where; the oldest entries are in front."""
        now = time.monotonic()
        self._sent.pop(checkpoint, None)
        self._sent[checkpoint] = (replica, now)
        while (oldest := next(iter(self._sent))) and self._sent[oldest][1] < now - _REMEMBERED_S:
            del self._sent[oldest]

    def _seen(self, replica: RunningReplica) -> Seen:
        name = replica.replica_id.unique_id
        loaded = {row["checkpoint"] for row in replica.routing_stats.get("engines", ())}
        sent = {checkpoint for checkpoint, (place, _) in self._sent.items() if place == name}
        queue = self.replica_queue_len_cache.get(replica.replica_id) or 0
        return Seen(name, frozenset(loaded | sent), queue)

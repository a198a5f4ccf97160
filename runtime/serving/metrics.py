"""What a server counts, in Prometheus' text format. One registry per server, so that two in one process stay apart."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .drawing_process.messages import Message

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server; `observe_residency` takes what the drawing process reports."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("personalq_requests", "HTTP requests", ["path", "status"], registry=registry)
        self.request_seconds = Histogram(
            "personalq_request_seconds", "HTTP request duration", ["path"], buckets=_SECONDS, registry=registry
        )
        self.images = Counter("personalq_images", "Pictures drawn", ["checkpoint"], registry=registry)
        self.draw_seconds = Histogram(
            "personalq_draw_seconds", "Denoising of one batch", buckets=_SECONDS, registry=registry
        )
        self.wait_seconds = Histogram(
            "personalq_wait_seconds", "From queued to drawing", buckets=_SECONDS, registry=registry
        )
        self.batch_size = Histogram(
            "personalq_batch_pictures", "Pictures drawn together", buckets=(1, 2, 3, 4, 6, 8), registry=registry
        )
        self.refused = Counter("personalq_refused", "Requests refused, by error code", ["code"], registry=registry)
        self.checkin = Counter("personalq_checkin", "Check-in's decisions", ["decision"], registry=registry)
        self.checkin_seconds = Histogram(
            "personalq_checkin_seconds", "Check-in's own time", buckets=_SECONDS, registry=registry
        )
        self.switch_seconds = Histogram(
            "personalq_engine_load_seconds",
            "Loading one engine that was not resident",
            buckets=_SECONDS,
            registry=registry,
        )
        self.lookups = Counter(
            "personalq_engine_lookups", "Engines asked for: hit or miss", ["result"], registry=registry
        )
        self.evictions = Counter("personalq_engine_evictions", "Engines evicted", registry=registry)
        self.prefetches = Counter("personalq_engine_prefetches", "Engines loaded ahead of a request", registry=registry)
        self.resident = Gauge("personalq_engines_resident", "Engines in memory", registry=registry)
        self.resident_bytes = Gauge("personalq_engines_resident_bytes", "Their memory", registry=registry)
        self.budget_bytes = Gauge("personalq_engines_budget_bytes", "The budget for them", registry=registry)
        self.worker_bytes = Gauge("personalq_draw_process_bytes", "Drawing process' private memory", registry=registry)
        self.queue = Gauge("personalq_queue_pictures", "Pictures waiting or being drawn", registry=registry)
        self.restarts = Counter("personalq_draw_process_restarts", "Drawing processes that died", registry=registry)
        self._seen: dict[str, int] = {}

    def observe_residency(self, report: Message) -> None:
        """Take a report in; its counts grow from 0 in each drawing process."""
        counts = report["counts"]
        for name, counter in (
            ("hits", self.lookups.labels("hit")),
            ("misses", self.lookups.labels("miss")),
            ("evictions", self.evictions),
            ("prefetched", self.prefetches),
        ):
            before = self._seen.get(name, 0)
            counter.inc(counts[name] - before if counts[name] >= before else counts[name])
            self._seen[name] = counts[name]
        for seconds in report["load_seconds"]:
            self.switch_seconds.observe(seconds)
        self.resident.set(len(report["engines"]))
        self.resident_bytes.set(report["used_bytes"])
        self.budget_bytes.set(report["budget_bytes"])
        self.worker_bytes.set(report["process_bytes"])

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self.registry)

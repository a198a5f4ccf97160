"""`personalq export` and `personalq serve` as click commands: on this machine, or on many. Imports nothing heavy."""

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from personalq.errors import RepositoryError
from runtime.commands import exporting_options, fleet_options, serving_options
from runtime.console import Result, progress, reports

from .exporting import export_base, export_one, refuse_given

if TYPE_CHECKING:
    from personalq.repository import Repository

    from .run import Workers
    from .work import Work


ONE_ONLY = ("lint", "triton", "layout", "out", "rank", "energy", "correct")
MANY_ONLY = ("workers", "threads", "memory_mb", "retries", "verify", "on", "address", "gpus")
OF_RAY = ("address", "gpus")
SERVED_ON_RAY = (*OF_RAY, "replicas", "max_replicas", "threads")


def export_command(opened: "Callable[[], Repository]") -> click.Command:
    """The command. opened: the repository of --repo."""

    @click.command()
    @click.argument("id_", metavar="[ID]", required=False)
    @exporting_options
    @fleet_options
    @reports
    def export(id_: str | None, base_id: str | None, every: bool, ids: Path | None, **options: Any) -> Result:
        """Export a checkpoint, attached to its base's engine or merged into its own; a base's engine; or many at once."""
        if [id_ is not None, base_id is not None, every, ids is not None].count(True) != 1:
            raise click.UsageError("name one of ID, --base ID, --all and --ids FILE")
        is_many = every or ids is not None
        refuse_given(ONE_ONLY if is_many else MANY_ONLY, "one ID" if is_many else "--all or --ids")
        if options["on"] == "ray":
            refuse_given(("workers",), "--on local; Ray runs as many as the cluster has room for")
        else:
            refuse_given(OF_RAY, "--on ray")
        if is_many:
            return _many(opened(), ids, **options)
        return export_one(opened(), id_, options) if id_ is not None else export_base(opened(), base_id or "", options)

    return export


def serve_command(opened: "Callable[..., Repository]") -> click.Command:
    """The command. opened: the repository of --repo; create=True makes it."""

    @click.command()
    @serving_options
    def serve(on: str, **options: Any) -> None:
        """Serve the repository over HTTP: OpenAI-compatible images, Check-in, metrics, and a page at /."""
        if on == "local":
            refuse_given(SERVED_ON_RAY, "--on ray")
        root = opened(create=bool(options["store"])).root
        ray = {name: options.pop(name) for name in SERVED_ON_RAY}
        if on == "ray":
            _serve_on_ray(root, options, **ray)
            return
        from runtime.serving.serve import serve_repository

        serve_repository(root, **options)

    return serve


def _serve_on_ray(
    root: Path,
    options: dict[str, Any],
    *,
    address: str,
    gpus: float | None,
    replicas: int,
    max_replicas: int | None,
    threads: int,
) -> None:
    from runtime.serving.options import options_of

    from .cluster import Replicas
    from .serve import serve_on_ray

    gpus = float(options["target"].startswith("tensorrt")) if gpus is None else gpus
    size = Replicas(replicas, max(replicas, max_replicas or 0), threads, gpus)
    serve_on_ray(options_of(root, threads=threads, **options), size, address)


def _many(repository: "Repository", ids: Path | None, *, retries: int, **options: Any) -> Result:
    from .run import run_fleet
    from .work import Work, read_ids, spec_name

    named = read_ids(ids) if ids is not None else with_weights(repository)
    work = Work(
        root=str(repository.root),
        spec=spec_name(options["spec"]),
        form=options["form"],
        targets=options["targets"],
        settings=options["settings"],
        verify=options["verify"],
        threads=options["threads"],
        store=options["store"],
    )
    workers = (_cluster if options["on"] == "ray" else _pool)(work, **options)
    with redirect_stdout(sys.stderr), progress() as report:  # Ray prints on stdout when it loses a machine
        summary = run_fleet(work, named, workers, retries, report)
    return Result(summary.to_json(), code=1 if summary.has_failed else 0)


def _pool(work: "Work", *, workers: int | None, memory_mb: float, **_: Any) -> "Workers":
    from .pool import Pool, fitting_workers

    return Pool(work, workers or fitting_workers(work.threads, round(memory_mb * 1e6)))


def _cluster(work: "Work", *, address: str, memory_mb: float, gpus: float | None, **_: Any) -> "Workers":
    from .cluster import Cluster, Needs

    gpus = float("tensorrt" in work.targets) if gpus is None else gpus
    return Cluster(work, address, Needs(work.threads, gpus, round(memory_mb * 1e6)))


def with_weights(repository: "Repository") -> list[str]:
    """Every checkpoint that can be exported. Raises RepositoryError when there is none."""
    found = [entry.card.id for entry in repository.entries() if entry.has_weights]
    if not found:
        raise RepositoryError(
            f"{repository.root}: must hold a checkpoint with weights, got none; add one with 'personalq add SOURCE'"
        )
    return found

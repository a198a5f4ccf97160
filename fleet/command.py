"""`personalq export` and `personalq serve` as click commands: on this machine, or on many. Imports nothing heavy."""

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from personalq.errors import RepositoryError
from runtime.commands import exporting_options, fleet_options, serving_options
from runtime.console import Result, progress, reports

if TYPE_CHECKING:
    from personalq.repository import Repository

    from .run import Workers
    from .work import Work


ONE_ONLY = ("lint", "triton", "layout", "out")
BUNDLE_ONLY = ("targets", "settings", "lint", "triton", "store")
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
    def export(id_: str | None, every: bool, ids: Path | None, **options: Any) -> Result:
        """Export a checkpoint under a spec into a bundle, and build its engines; with --all or --ids, many of them."""
        if [id_ is not None, every, ids is not None].count(True) != 1:
            raise click.UsageError("name one of ID, --all and --ids FILE")
        _refuse_given(ONE_ONLY if id_ is None else MANY_ONLY, "one ID" if id_ is None else "--all or --ids")
        if options["on"] == "ray":
            _refuse_given(("workers",), "--on local; Ray runs as many as the cluster has room for")
        else:
            _refuse_given(OF_RAY, "--on ray")
        return _one(opened(), id_, **options) if id_ is not None else _many(opened(), ids, **options)

    return export


def serve_command(opened: "Callable[..., Repository]") -> click.Command:
    """The command. opened: the repository of --repo; create=True makes it."""

    @click.command()
    @serving_options
    def serve(on: str, **options: Any) -> None:
        """Serve the repository over HTTP: OpenAI-compatible images, Check-in, metrics, and a page at /."""
        if on == "local":
            _refuse_given(SERVED_ON_RAY, "--on ray")
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


def _refuse_given(names: tuple[str, ...], goes_with: str) -> None:
    """Refuse options that would be ignored."""
    context = click.get_current_context()
    given = [name for name in names if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE]
    if given:
        flag = next(one.opts[0] for one in context.command.params if one.name == given[0])
        raise click.UsageError(f"{flag} goes with {goes_with}")


def _one(repository: "Repository", id_: str, **options: Any) -> Result:
    if options["layout"] is not None or options["out"] is not None:
        return _layout(repository, id_, options["spec"], options["layout"], options["out"])
    repository.checkpoint_dir(id_)
    from exporters.request import export_request, lint_result

    with progress() as report:
        made = export_request(repository, id_, options["spec"], options["targets"], report, options["settings"])
    if options["lint"]:
        return Result(*lint_result(made))
    published: dict[str, str] = {}
    if options["store"]:
        from personalq.repository.remote import Remote

        Remote(options["store"]).publish(made.bundle, repository.card(id_))
        published = {"store": options["store"]}
    triton = _triton(made.bundle, options["triton"])
    return Result({**asdict(made), "bundle": str(made.bundle), **triton, **published})


def _layout(repository: "Repository", id_: str, spec: Path | None, layout: str | None, out: Path | None) -> Result:
    """A folder for another pipeline, instead of a bundle."""
    if layout is None or out is None:
        raise click.UsageError("--layout and --out go together")
    _refuse_given(BUNDLE_ONLY, "a bundle, which --layout does not write")
    repository.checkpoint_dir(id_)
    from exporters.request import optimum_request

    with progress() as report:
        made = optimum_request(repository, id_, spec, out, report)
    return Result({"layout": layout, **asdict(made), "folder": str(made.folder)})


def _triton(bundle: Path, place: Path | None) -> dict[str, list[str]]:
    """The models that were written, when a Triton model repository was named."""
    if place is None:
        return {}
    from exporters.targets.triton import write_triton

    return {"triton": write_triton(bundle, place)}


def _many(repository: "Repository", ids: Path | None, *, retries: int, **options: Any) -> Result:
    from .run import run_fleet
    from .work import Work, read_ids, spec_name

    named = read_ids(ids) if ids is not None else with_weights(repository)
    work = Work(
        root=str(repository.root),
        spec=spec_name(options["spec"]),
        targets=options["targets"],
        settings=options["settings"],
        verify=options["verify"],
        threads=options["threads"],
        store=options["store"],
    )
    workers = (_cluster if options["on"] == "ray" else _pool)(work, **options)
    with redirect_stdout(sys.stderr), progress() as report:  # Ray prints on stdout when it loses a machine
        summary = run_fleet(work, named, workers, retries, report)
    return Result(summary.to_json(), code=1 if summary.of("failed") else 0)


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

"""`personalq export ID` and `--base ID`: which form, which options go with it, what is said about it. Imports nothing heavy."""

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from runtime.console import Result, progress

if TYPE_CHECKING:
    from personalq.repository import Repository
    from personalq.repository.forms import Form

logger = logging.getLogger("personalq.fleet")

OF_BUNDLE = ("targets", "settings", "lint", "triton", "store")
OF_ENGINE = ("spec", "targets", "settings", "lint", "triton", "layout", "out")
OF_ADAPTER = ("rank", "energy", "correct")
OF_CHECKPOINT = ("form", *OF_ADAPTER, "layout", "out", "triton")


def export_one(repository: "Repository", id_: str, options: dict[str, Any]) -> Result:
    """A checkpoint's bundle, in the form that was asked for or that suits it."""
    repository.checkpoint_dir(id_)
    if (options["layout"] is None) != (options["out"] is None):
        raise click.UsageError("--layout and --out go together")
    form = chosen_form(repository, id_, options)
    if form.name == "attached":
        base = repository.card(id_).base
        refuse_given(
            OF_ENGINE,
            f"--form merged; attached, {id_} is drawn by the engines of its base: 'personalq export --base {base}' makes them",
        )
        return _attached(repository, id_, form, options)
    refuse_given(OF_ADAPTER, f"--form attached; {id_} is merged: {form.reason}")
    return _layout(repository, id_, options) if options["layout"] else _merged(repository, id_, form, options)


def chosen_form(repository: "Repository", id_: str, options: dict[str, Any]) -> "Form":
    """The form that --form names; by 'auto' merged when an option means an engine of its own, else what suits."""
    from personalq.repository.forms import Form, form_of

    for name, reason in (
        ("spec", "--spec was given, which is of an engine of its own"),
        ("layout", "--layout was given, whose folder holds one model with the delta merged"),
    ):
        if options["form"] == "auto" and options[name] is not None:
            return Form("merged", reason)
    return form_of(repository.whole(id_), options["form"])


def export_base(repository: "Repository", base_id: str, options: dict[str, Any]) -> Result:
    """A base's engine, which adapters are attached to."""
    refuse_given(OF_CHECKPOINT, "one checkpoint, not with --base")
    from exporters.request import base_request, lint_result

    with progress() as report:
        made = base_request(repository, base_id, options["spec"], options["targets"], report, options["settings"])
    if options["lint"]:
        return Result(*lint_result(made))
    if options["store"]:
        from personalq.repository.remote import Remote

        Remote(options["store"]).publish(made.bundle, repository.whole(base_id).card)
    told = {"base": base_id, "form": "base", **asdict(made), "bundle": str(made.bundle)}
    return Result(told | ({"store": options["store"]} if options["store"] else {}))


def _attached(repository: "Repository", id_: str, form: "Form", options: dict[str, Any]) -> Result:
    from exporters.adapters import export_adapter
    from personalq.weights.adapter import ENERGY, MOST_RANK, Limits

    started = time.perf_counter()
    limits = Limits(rank=options["rank"] or MOST_RANK, energy=options["energy"] or ENERGY)
    with progress() as report:
        correction = None
        if options["correct"]:
            from .correcting import corrected

            correction = corrected(repository, id_, options["correct"], report)
        made = export_adapter(repository, id_, limits, correction, report)
    base = repository.card(id_).base
    if not made.base_bundle:
        logger.warning(
            "%s: base %s has no engine here that it can be attached to; run 'personalq calibrate --base %s && personalq "
            "export --base %s'",
            *(id_, base, base, base),
        )
    published = _publish_attached(repository, id_, made.bundle, made.base_bundle, options["store"])
    told = {"form": form.name, "form_reason": form.reason, **asdict(made), "bundle": str(made.bundle)}
    whole = {"errors": dict(made.errors), "left_out": list(made.left_out), "seconds": time.perf_counter() - started}
    return Result({**told, **whole, **published})


def _publish_attached(repository: "Repository", id_: str, bundle: Path, engine: str, url: str) -> dict[str, Any]:
    """Publish an adapter, and its base's engine when it is here; say when the store has none."""
    if not url:
        return {}
    from personalq.adapters import read_adapter_manifest
    from personalq.repository.remote import Remote

    remote, base = Remote(url), repository.card(id_).base
    remote.publish(bundle, repository.card(id_))
    if engine:
        remote.publish(Path(engine), repository.whole(base).card)
    has_base = remote.base(read_adapter_manifest(bundle).base_sha256) is not None
    if not has_base:
        logger.warning(
            "%s: the store has no engine of base %s; run 'personalq export --base %s --store %s'", id_, base, base, url
        )
    return {"store": url, "base_in_store": has_base}


def _merged(repository: "Repository", id_: str, form: "Form", options: dict[str, Any]) -> Result:
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
    told = {"form": form.name, "form_reason": form.reason, **asdict(made), "bundle": str(made.bundle)}
    return Result({**told, "base_bundle": "", **triton, **published})


def _layout(repository: "Repository", id_: str, options: dict[str, Any]) -> Result:
    """A folder for another pipeline, instead of a bundle."""
    refuse_given(OF_BUNDLE, "a bundle, which --layout does not write")
    from exporters.request import optimum_request

    with progress() as report:
        made = optimum_request(repository, id_, options["spec"], options["out"], report)
    return Result({"layout": options["layout"], **asdict(made), "folder": str(made.folder)})


def _triton(bundle: Path, place: Path | None) -> dict[str, list[str]]:
    """The models that were written, when a Triton model repository was named."""
    if place is None:
        return {}
    from exporters.targets.triton import write_triton

    return {"triton": write_triton(bundle, place)}


def refuse_given(names: tuple[str, ...], goes_with: str) -> None:
    """Refuse options that would be ignored."""
    context = click.get_current_context()
    given = [name for name in names if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE]
    if given:
        flag = next(one.opts[0] for one in context.command.params if one.name == given[0])
        raise click.UsageError(f"{flag} goes with {goes_with}")

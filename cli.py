"""The `personalq` command: parse, one call, print. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fleet.command import export_command, serve_command
from fleet.convert import convert
from runtime.commands import asking_options, drawing_options
from runtime.console import Commands, Result, each_line, progress, reports, start_logging, talk, wants_json
from runtime.gate.command import verify_command

if TYPE_CHECKING:
    from personalq.repository import Repository
    from runtime.gate.request import OpenWeights

PATH = click.Path(path_type=Path)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--repo", type=PATH, envvar="PERSONALQ_REPO", help="Repository folder. Default: the shipped gallery.")
@click.option("--json", "as_json", is_flag=True, help="As after the command: print one JSON object on stdout.")
@click.version_option(package_name="personalq", prog_name="personalq")
@click.pass_context
def cli(context: click.Context, repo: Path | None, as_json: bool) -> None:
    """Find the personalised checkpoint a request means, compress it, run it."""
    start_logging()
    context.obj = repo


def main() -> None:
    """The console script."""
    cli(prog_name="personalq")


def opened(*, create: bool = False) -> Repository:
    """The repository of --repo, $PERSONALQ_REPO, or the gallery."""
    from personalq.repository import Repository

    return Repository.open(click.get_current_context().find_root().obj, create=create)


@cli.command()
@click.argument("sources", metavar="SOURCE...", nargs=-1, type=PATH)
@click.option("--cards", type=PATH, help="Take in a file of cards without weights: JSONL, Civitai, StylusDocs, ...")
@click.option("--base", default="", help="Base of the sources: an id here, or a folder or file to add first.")
@click.option("--id", "card_id", default="", help="Id for a single SOURCE, in place of its card's.")
@click.option("--replace", is_flag=True, help="Replace a checkpoint that has the same id.")
@click.option("--adult", is_flag=True, help="Also take in what is marked as adult content or a real person.")
@reports
def add(sources: tuple[Path, ...], cards: Path | None, base: str, card_id: str, replace: bool, adult: bool) -> Result:
    """Take in checkpoints: diffusers folders, one-file models, LoRAs, Custom-Diffusion deltas, embeddings, folders of them."""
    from personalq.repository import AddResult

    if not (sources or cards or base) or (card_id and len(sources) != 1):
        raise click.UsageError("name at least one SOURCE (with --id exactly one), --cards FILE or --base FOLDER|FILE")
    repository, result, bases = opened(create=True), AddResult(), []
    if base and base not in repository.bases() and (Path(base).exists() or base.endswith((".safetensors", ".ckpt"))):
        made = repository.add_base(Path(base))
        base = made.id
        bases.append(asdict(made))
    with progress() as report:
        for source in sources:
            result += repository.add_all(source, report, base=base, card_id=card_id, replace=replace, adult=adult)
    result += repository.add_cards(cards, adult=adult) if cards else AddResult()
    click.echo("".join(f"personalq: {refused.reason}\n" for refused in result.refused), err=True, nl=False)
    return Result({**result.to_json(), "bases": bases}, code=1 if result.refused else 0)


cli.add_command(convert)


@cli.command("ls")
@reports
def list_() -> Result:
    """List the checkpoints."""
    return Result({"checkpoints": [entry.to_json() for entry in opened().entries()]})


@cli.command()
@click.argument("id_", metavar="ID")
@reports
def show(id_: str) -> Result:
    """Show one checkpoint's card, its form and its bundles."""
    repository = opened()
    found = {"has_weights": repository.has_weights(id_), **repository.exports(id_).to_json()}
    return Result({**repository.card(id_).to_json(), **found})


@cli.command()
@click.argument("id_", metavar="ID")
@reports
def rm(id_: str) -> Result:
    """Remove a checkpoint: its card, its weights and its bundles."""
    opened().remove(id_)
    return Result({"removed": id_}, [f"removed {id_}"])


@cli.command()
@click.option("--fix", is_flag=True, help="Remove what killed processes left behind.")
@reports
def check(fix: bool) -> Result:
    """Find what is wrong in the repository; exit 1 when anything is."""
    problems = opened().check(fix=fix)
    code = 1 if any(not problem.fixed for problem in problems) else 0
    lines = [problem.message for problem in problems] or ["nothing is wrong"]
    return Result({"problems": [problem.to_json() for problem in problems]}, lines, code)


@cli.command()
@reports
def index() -> Result:
    """Build the Check-in index over all cards."""
    from personalq.checkin import index as build

    return Result(build(opened()).to_json())


@cli.command()
@click.argument("request", required=False)
@click.option("--batch", type=PATH, help='JSONL file of {"request": ..., "answers": [...]}; one JSON object a line.')
@asking_options
@reports
def ask(request: str | None, answers: tuple[str, ...], batch: Path | None, llm: str | None, llm_model: str) -> Result:
    """Find the checkpoint a REQUEST means, and write its prompt."""
    from personalq.checkin import Asker

    if (request is None) == (batch is None):
        raise click.UsageError("name a REQUEST or --batch FILE, one of the two")
    decide = Asker.at(opened(), llm, llm_model)
    if batch is not None:
        return each_line(batch, "request", lambda line: decide(line["request"], line.get("answers", ())))
    return Result(talk(lambda said: decide(request or "", said), answers).to_json())


@cli.command()
@click.argument("id_", metavar="[ID]", default="")
@click.option("--base", default="", help="Calibrate a base instead, also as its checkpoints make it.")
@click.option("--over", help="Ids of these checkpoints, with commas. Default: at most 16 that differ.")
@click.option("--policy", default="taq", show_default=True, help="Rule that turns statistics into bits.")
@click.option("--bits", default="w8a8", show_default=True, help="Bits of weights and activations.")
@click.option("--budget-mb", type=click.FloatRange(min=0, min_open=True), help="Share out this many megabytes.")
@click.option("--row-bits", default="8", type=click.Choice(["8", "4"]), help="Of the text rows that are not kept.")
@click.option("--samples", default=8, show_default=True, type=click.IntRange(min=1), help="Prompts of a checkpoint.")
@click.option("--steps", default=25, show_default=True, type=click.IntRange(min=1), help="Steps for each prompt.")
@click.option("--report", type=PATH, help="Also write an HTML page: what was measured, kept, and why.")
@reports
def calibrate(id_: str, base: str, over: str | None, budget_mb: float | None, row_bits: str, **rule: Any) -> Result:
    """Run a checkpoint or a base, collect its statistics and write its TAQ spec."""
    if bool(id_) == bool(base):
        raise click.UsageError("name one checkpoint's ID, or a base with --base ID")
    repository = opened()
    if not repository.whole(base or id_).is_base and base:
        raise click.UsageError(f"--base: must be one of {', '.join(repository.bases())}, got checkpoint {base!r}")
    from calibration import calibrate as room

    budget = None if budget_mb is None else round(budget_mb * 1e6)
    listed = None if over is None else tuple(one.strip() for one in over.split(",") if one.strip())
    with progress() as report:
        options = room.CalibrateOptions(budget_bytes=budget, row_bits=int(row_bits), over=listed, **rule)
        made = room.calibrate(repository, base or id_, options, report)
    return Result({"policy": options.policy, "bits": options.bits, **made.to_json()})


cli.add_command(export_command(opened))


def weights_reader() -> OpenWeights:
    """How the gate reads a checkpoint's own weights."""
    from personalq.weights.checkpoint import open_weights

    return open_weights


cli.add_command(verify_command(opened, weights_reader))


@cli.command()
@click.argument("request")
@click.option("-o", "--out", type=PATH, required=True, help="PNG file to write.")
@drawing_options
@reports
def generate(request: str, out: Path, **options: Any) -> Result:
    """Draw a REQUEST with the checkpoint that Check-in picks."""
    from runtime.drawing import generate as room

    with progress() as report:
        return Result(asdict(room.generate(opened(), request, out, room.order_of(**options), report)))


@cli.command()
@click.option("--out", type=PATH, required=True, help="Folder for the pictures.")
@reports
def demo(out: Path) -> Result:
    """Take one request all the way: find, compress, export, draw, beside the uncompressed picture."""
    from gallery.demo import run

    with progress() as report:
        return Result(run(out, opened(), report))


cli.add_command(serve_command(opened))


@cli.command()
@reports
def doctor() -> Result:
    """Show this machine's devices, targets and versions."""
    from runtime.doctor import examine

    return Result(examine())


@cli.group()
def spec() -> None:
    """Look into TAQ specs."""


@spec.command()
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@reports
def diff(a: Path, b: Path) -> Result:
    """Show every decision in which two specs differ."""
    from personalq.spec import diff_specs, read_spec

    lines = diff_specs(read_spec(a).spec, read_spec(b).spec)
    return Result({"differences": lines}, lines or ["no decision differs"])


@cli.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("name")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@reports
def bench(name: str, arguments: tuple[str, ...]) -> Result:
    """Run one benchmark of bench/; its options follow its NAME. The last line is one JSON object; --json: the only one."""
    from bench import names, run, run_for_json

    if name not in names():
        raise click.UsageError(f"NAME must be one of {', '.join(names())}, got {name!r}")
    return Result({}, code=(run_for_json if wants_json() else run)(name, arguments), printed=True)

"""`personalq convert` as a click command; what it does is in exporters.convert. Importing this imports nothing heavy."""

from dataclasses import asdict
from pathlib import Path

import click

from runtime.console import Result, progress, reports

PATH = click.Path(path_type=Path)


@click.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=PATH)
@click.option("--out", type=PATH, metavar="DIR", help="Folder for what is written. Default: beside each FILE.")
@click.option("--replace", is_flag=True, help="Replace safetensors files that are there.")
@reports
def convert(files: tuple[Path, ...], out: Path | None, replace: bool) -> Result:
    """Turn pickled weights (.ckpt, .pt, .bin) into safetensors: their tensors are loaded, no code is run."""
    from exporters import convert as room

    with progress() as report:
        converted, refused = room.convert(files, out, replace=replace, progress=report)
    click.echo("".join(f"personalq: {one.reason}\n" for one in refused), err=True, nl=False)
    data = {"converted": [asdict(one) for one in converted], "refused": [asdict(one) for one in refused]}
    return Result(data, code=1 if refused else 0)

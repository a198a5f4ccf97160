"""The options of the commands that export, draw and serve, and the values they become. It knows click, not engines."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .gate import LEVELS

TARGETS = click.Choice(["onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"])
_FILE = click.Path(path_type=Path)
_TARGET = click.option("--target", type=TARGETS, default="onnxruntime", show_default=True)
_ON = click.option("--on", type=click.Choice(["local", "ray"]), default="local", show_default=True, help="Where.")

_DRAWING = (
    click.option("--checkpoint", default="", help="Draw with this checkpoint; Check-in only writes the prompt."),
    click.option(
        "--adapter",
        "adapters",
        multiple=True,
        metavar="ID|FILE[:STRENGTH]",
        help="Attach a checkpoint, or a LoRA file that was never added; repeat for several.",
    ),
    click.option(
        "--on", default="", metavar="BASE", help="Attach to this base of the family, not to the checkpoint's own."
    ),
    click.option("--steps", type=click.IntRange(min=1), help="Denoising steps. Default: what the base recommends."),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True),
    _TARGET,
    click.option("--sampler", help="ddim, euler, euler_a, dpmpp_2m[_karras], pndm or lcm. Default: the base's own."),
)
_EXPORTING = (
    click.option("--base", "base_id", metavar="ID", help="Export a base's engine, which its checkpoints attach to."),
    click.option(
        "--form",
        type=click.Choice(["auto", "attached", "merged"]),
        default="auto",
        show_default=True,
        help="Attached to the base's engine, or merged into an engine of its own; auto: attached where that is exact.",
    ),
    click.option(
        "--rank", type=click.IntRange(min=1), help="Attached: the most of a layer, where it is cut. Default: 256."
    ),
    click.option(
        "--energy",
        type=click.FloatRange(min=0, max=1, min_open=True),
        help="Attached: the share of a layer's change that is enough. Default: 0.999999.",
    ),
    click.option(
        "--correct",
        type=click.IntRange(min=1),
        metavar="RANK",
        help="Attached: also make up for the base's rounding, by so many ranks.",
    ),
    click.option("--spec", type=_FILE, help="A file, or 'fp16' (nothing quantised). Default: the last one calibrated."),
    click.option("--target", "targets", type=TARGETS, multiple=True, default=["onnxruntime"], show_default=True),
    click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Of a TensorRT plan: docs/tensorrt.md."),
    click.option("--lint", type=click.Choice(["trt"]), help="Say what a TensorRT builder would not take."),
    click.option("--store", default="", metavar="URL", help="Also publish to a store: s3://bucket/place, file:///..."),
    click.option("--triton", type=_FILE, metavar="DIR", help="Also write Triton models into DIR: docs/triton.md."),
    click.option("--layout", type=click.Choice(["optimum"]), help="Write a folder for another pipeline into --out."),
    click.option("--out", type=_FILE, help="The new folder of --layout."),
)
_FLEET = (
    click.option("--all", "every", is_flag=True, help="Every checkpoint with weights: calibrate, export, verify."),
    click.option("--ids", type=_FILE, help="The same for the ids in FILE, one a line."),
    click.option("--workers", type=click.IntRange(min=1), help="At a time. Default: what cores and memory allow."),
    click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True, help="Cores of one export."),
    click.option(
        "--memory-mb", type=click.FloatRange(min=1), default=4000.0, show_default=True, help="What one export takes."
    ),
    click.option("--retries", type=click.IntRange(min=0), default=2, show_default=True, help="When a worker is lost."),
    click.option("--verify", type=click.Choice([*LEVELS, "none"]), default="images", show_default=True),
    _ON,
    click.option("--address", default="", help="Of the Ray cluster. Default: this machine's."),
    click.option("--gpus", type=click.FloatRange(min=0), help="GPUs of one export on Ray. Default: 1 for tensorrt."),
)
_ASKING = (
    click.option("--answer", "answers", multiple=True, help="Answer to the question asked; repeat for later ones."),
    click.option("--llm", metavar="URL", help="Let a model at this OpenAI-compatible endpoint judge the shortlist."),
    click.option("--llm-model", default="", metavar="NAME", help="The model's name there. Key: $OPENAI_API_KEY."),
)
_SERVING = (
    click.option("--host", default="127.0.0.1", show_default=True),
    click.option("--port", type=click.IntRange(0, 65535), default=8765, show_default=True),
    click.option("--budget-mb", type=click.FloatRange(min=1), default=2000.0, show_default=True, help="For engines."),
    _TARGET,
    click.option("--queue", type=click.IntRange(min=1), default=32, show_default=True, help="Pictures that may wait."),
    click.option(
        "--max-batch", type=click.IntRange(min=1), default=4, show_default=True, help="Pictures drawn together."
    ),
    click.option("--api-keys", type=_FILE, help="File of keys, one a line. Without it everybody may ask."),
    click.option(
        "--allow-origin", "origins", multiple=True, metavar="URL", help="Whose pages may ask from a browser; '*': all."
    ),
    click.option("--store", default="", metavar="URL", help="Also serve the bundles of a store: docs/export.md."),
    click.option(
        "--cache-mb", type=click.FloatRange(min=1), default=20000.0, show_default=True, help="Of its bundles."
    ),
    click.option("--log-prompts", is_flag=True, help="Write prompts into the log."),
    _ON,
    click.option("--address", default="", help="Of the Ray cluster. Default: this machine's."),
    click.option("--replicas", type=click.IntRange(min=1), default=2, show_default=True, help="That draw, on Ray."),
    click.option("--max-replicas", type=click.IntRange(min=1), help="On Ray, when more is asked. Default: no more."),
    click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True, help="Of a replica on Ray."),
    click.option("--gpus", type=click.FloatRange(min=0), help="Of a replica on Ray. Default: 1 for tensorrt."),
)

Command = Callable[..., Any]


def exporting_options(command: Command) -> Command:
    """Give a command the options of `personalq export`."""
    return _with(_EXPORTING, command)


def fleet_options(command: Command) -> Command:
    """Give a command the options of `personalq export` over many checkpoints."""
    return _with(_FLEET, command)


def asking_options(command: Command) -> Command:
    """Give a command the options of `personalq ask` that say who decides."""
    return _with(_ASKING, command)


def drawing_options(command: Command) -> Command:
    """Give a command the options of `personalq generate`."""
    return _with(_DRAWING, command)


def serving_options(command: Command) -> Command:
    """Give a command the options of `personalq serve`."""
    return _with(_SERVING, command)


def _with(options: tuple[Callable[[Command], Command], ...], command: Command) -> Command:
    for option in reversed(options):
        command = option(command)
    return command

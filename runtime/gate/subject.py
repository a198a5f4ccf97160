"""What the checks work on: one bundle's goldens, graphs, engine and pipeline, and optional sources outside the bundle."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from personalq.bundle import SPEC, Manifest, inside
from personalq.errors import BundleError
from personalq.goldens import GOLDEN, POOLED, TENSORS, VERSION
from personalq.repository.settings import Settings
from personalq.rows import find_sequence
from personalq.spec import REFERENCE, SpecFile, read_spec

from ..drawing.attaching import Chosen, Opened, Wearing
from ..drawing.pipeline import Pipeline
from ..drawing.prompter import PromptRows
from ..engines.attached import Attached
from ..engines.engine import LOWERING, WIDE, Conditioning, TextEmbeds, unet_feed, unet_file
from ..engines.onnxfile import Graph, read_graph
from ..engines.ort import OrtEngine
from .levels.limits import LIMITS, precision

Float = npt.NDArray[np.float32]


class Judge(Protocol):
    """Scores pictures: uint8 (N,H,W,3) and their prompts -> score name -> (N,) values, larger is better."""

    def __call__(
        self, images: npt.NDArray[np.uint8], prompts: list[str]
    ) -> Mapping[str, npt.NDArray[np.floating[Any]]]: ...


# (component, parameter name) -> the checkpoint's tensor, delta merged; KeyError-like PersonalQError when there is none.
ReadWeight = Callable[[str, str], npt.NDArray[Any]]


@dataclass(frozen=True)
class Delta:
    """What an attached checkpoint changes in its base: merged reads its own tensors; changed: component -> parameters.

    first_added_id: the row of the text encoders' token embedding where the added ones begin; learned: those tokens, each
    with its pieces. trigger, class_noun: the card's. weights_sha256, settings: of base and delta, as they are now.
    """

    merged: ReadWeight
    changed: Mapping[str, frozenset[str]]
    first_added_id: int
    learned: tuple[tuple[str, tuple[str, ...]], ...]
    trigger: tuple[str, ...]
    class_noun: str
    weights_sha256: Callable[[], str]
    settings: Settings


@dataclass(frozen=True)
class Sources:
    """What a check may use besides the bundle; each may be missing, and its checks are then left out, and `missing` says so.

    weights, weights_sha256, settings (scheduler and tokenizers): of what the graphs hold, as it lies in the repository now:
    the checkpoint, or its base when it is attached; delta: the rest then. golden: where the goldens of an attached
    checkpoint are; those of others lie in their bundle. reference: the unquantised form of the same. judge: see Judge.
    """

    weights: ReadWeight | None = None
    delta: Delta | None = None
    weights_sha256: Callable[[], str] | None = None
    settings: Settings | None = None
    golden: Path | None = None
    reference: Path | None = None
    judge: Judge | None = None

    def missing(self) -> tuple[str, ...]:
        """What cannot be compared for lack of a source, in words."""
        reasons = {
            "stored weights: the checkpoint is not in the repository": self.weights,
            "more pictures: the repository has no fp32 bundle of this checkpoint, nor of its base": self.reference,
        }
        return tuple(text for text, source in reasons.items() if source is None)


@dataclass
class Subject:
    """One bundle under the checks. `measured` and `layers` (SNR dB per golden input) are filled by them.

    adapter: attached to the bundle, which is a base's then; `manifest` is what the pictures see, `engine_manifest` the
    bundle's own. move: what is done to start noise before it is used, see `nudged`. references: the unquantised bundle's
    pictures, by how many were asked for.
    """

    bundle: Path
    manifest: Manifest
    sources: Sources
    threads: int | None = None
    adapter: Opened | None = None
    measured: dict[str, list[float]] = field(default_factory=dict)
    layers: dict[str, list[float]] = field(default_factory=dict)
    references: dict[int, npt.NDArray[np.uint8]] = field(default_factory=dict)
    move: Callable[[Float], Float] = lambda values: values

    def __post_init__(self) -> None:
        self.engine_manifest = self.manifest
        self.chosen = [] if self.adapter is None else [Chosen(self.adapter)]
        self.wearing = Wearing(self.engine_manifest, self.bundle, self.chosen)
        self.manifest = self.wearing.manifest
        self.limits = LIMITS[precision(self.manifest)]
        self.golden, self.notes = read_golden(self._golden_file())
        self.prompts: list[str] = json.loads(self.notes.get("prompts", "[]"))
        self.steps = int(self.notes.get("steps", self.manifest.steps))
        self.guidance = float(self.notes.get("guidance", self.manifest.guidance))
        self.sampler = self.notes.get("sampler", "ddim")  # goldens that do not say were drawn by DDIM

    def _golden_file(self) -> Path:
        """Goldens are of one checkpoint: those in a base's bundle are the base's own, not those of what is attached to it."""
        if self.adapter is not None and self.sources.golden is None:
            id_ = self.manifest.checkpoint.id
            raise BundleError(
                f"{REFERENCE}: must be the goldens of {id_}, got none beside its adapter; verify it by its id, in its repository"
            )
        return self.sources.golden or inside(self.bundle, GOLDEN)

    @cached_property
    def engine(self) -> OrtEngine:
        return OrtEngine(self.bundle, self.threads)

    @cached_property
    def pipeline(self) -> Pipeline:
        return Pipeline(self.engine, self.chosen)

    @property
    def attached(self) -> Attached:
        """What is attached, as the engine's graphs take it."""
        return self.pipeline.wearing.attached

    @cached_property
    def spec_file(self) -> SpecFile:
        return read_spec(inside(self.bundle, SPEC))

    @cached_property
    def unet_path(self) -> Path:
        """The graph of the UNet that draws: the one with a branch at every layer when an adapter needs it."""
        lowering = WIDE if self.attached.is_wide else LOWERING
        return inside(self.bundle, unet_file(self.engine_manifest, lowering))

    @cached_property
    def unet(self) -> Graph:
        return read_graph(self.unet_path)

    def graph(self, name: str) -> Graph:
        return read_graph(inside(self.bundle, name))

    @cached_property
    def rows(self) -> list[PromptRows]:
        """Rows of each golden prompt from its golden embeddings, so that the text encoder's error stays out."""
        ids = self.golden["ids"]
        return [self.pipeline.rows_of_ids(ids[i], embeds=self.embeds(i)) for i in range(len(ids))]

    def embeds(self, prompt: int) -> TextEmbeds:
        """The golden text embeddings of one prompt; SDXL's goldens hold its pooled text too."""
        states, pooled = self.golden["text_embeds"][prompt], self.golden.get(POOLED)
        return TextEmbeds(states[None], None if pooled is None else pooled[prompt][None])

    @cached_property
    def trigger_positions(self) -> list[list[int]]:
        """For each golden prompt: where its trigger stands."""
        sequences = [self.pipeline.tokenizer.token_ids(text) for text in self.manifest.checkpoint.trigger]
        return [[p for ids in sequences for p in find_sequence(row.tolist(), ids)] for row in self.golden["ids"]]

    def conditioning(self, n: int) -> Conditioning:
        """What golden input n conditions the UNet on."""
        return self.rows[int(self.golden["prompt"][n])].conditioning

    def feed(self, n: int) -> dict[str, npt.NDArray[Any]]:
        """Every input of the UNet for golden input n, a batch of one."""
        sample, timestep = (self.golden[name][n : n + 1] for name in ("sample", "timestep"))
        told = unet_feed(self.manifest, self.conditioning(n), *sample.shape[2:])
        matrices = self.attached.feed(self.engine_manifest.adapters, "unet", is_wide=self.attached.is_wide)
        return {"sample": sample, "timestep": timestep, **told, **matrices}

    def nudged(self, amount: np.float32, seed: int) -> "Subject":
        """The same bundle, its golden inputs moved by a relative +-amount: what another machine's float order might do."""
        generator = np.random.default_rng(seed)

        def move(values: Float) -> Float:
            signs = generator.choice(np.array([-1, 1], np.float32), values.shape)
            return np.asarray(values * (1 + amount * signs), np.float32)

        other = Subject(
            self.bundle,
            self.engine_manifest,
            self.sources,
            self.threads,
            self.adapter,
            references=self.references,
            move=move,
        )
        other.engine, other.pipeline = self.engine, self.pipeline
        for name in ("text_embeds", "sample", "start_noise", "latent", POOLED):
            if name in self.golden:
                other.golden[name] = move(self.golden[name])
        return other

    def noise_pred(self, conditioning: Conditioning, n: int, attached: Attached | None = None) -> Float:
        """(4,h,w): the UNet on golden input n. attached: in place of what is."""
        sample = self.golden["sample"][n : n + 1]
        height, width = sample.shape[2:]
        denoiser = self.engine.denoiser(conditioning, height, width, attached or self.attached)
        return np.array(denoiser(sample, float(self.golden["timestep"][n]))[0], dtype=np.float32)


def read_golden(file: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """Tensors and metadata of the goldens. Raises BundleError when they are missing, older, or lack a tensor."""
    from safetensors import safe_open

    if not file.is_file():
        where = "must be in the bundle" if file.name == GOLDEN else "must be among the specs"
        raise BundleError(f"{file.name}: {where}, got no file; export the checkpoint again")
    with safe_open(str(file), framework="numpy") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
        metadata = dict(opened.metadata() or {})
    if metadata.get("version", "1") != VERSION:
        raise BundleError(
            f"{GOLDEN}: version: must be {VERSION}, got {metadata.get('version', '1')}; calibrate and export again"
        )
    missing = [name for name in TENSORS if name not in tensors]
    if missing:
        raise BundleError(f"{GOLDEN}: must hold {', '.join(missing)}, got nothing of that name; export again")
    return tensors, metadata

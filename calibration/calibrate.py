"""`personalq calibrate`: run the checkpoint over its own prompts, stream statistics, apply a policy, write spec and goldens."""

import datetime
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from personalq.architecture import family_key, read_configs
from personalq.cards.card import Card, folder_name
from personalq.errors import SpecError
from personalq.repository import Repository
from personalq.repository.atomic import write_atomic
from personalq.repository.identity import weights_sha256
from personalq.repository.settings import Settings, read_settings
from personalq.rows import KeptTokens
from personalq.spec import REFERENCE, LayerSpec, Provenance, RowsSpec, Spec, SpecFile

from .decide import Decisions, decide, rule_of
from .model.conditioning import Pipe
from .model.independent import checked_against
from .model.pipeline import load_pipeline, quantisable_layers
from .model.reference import is_current, metadata_of, write_reference
from .policies import Tokens
from .prompts import calibration_prompts, prompts_sha256
from .report import report_html
from .statistics.evidence import Evidence, Recipe
from .statistics.ranges import LayerRanges
from .statistics.saved import NAME as STATISTICS

FLOAT_POLICIES = {"fp32": "float32", "fp16": "float16"}
ROW_BITS = (8, 4)
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class CalibrateOptions:
    """policy: see calibration.policies, or 'fp32' / 'fp16' (nothing quantised). samples: prompts run through all steps.

    budget_bytes: share this many bytes of layer weights out by harm. row_bits: of the text rows that are not kept, 8 or
    4 (always stored in a byte). report: an HTML page to write.
    """

    policy: str = "taq"
    bits: str = "w8a8"
    budget_bytes: int | None = None
    row_bits: int = 8
    samples: int = 8
    steps: int = 25
    seed: int = 0
    report: Path | None = None


@dataclass(frozen=True)
class CalibrateResult:
    spec_path: Path
    spec_file: SpecFile
    kept_tokens: tuple[str, ...]
    layers: int
    checked_against: str
    seconds: float
    peak_rss_bytes: int


def quiet(_: str, __: float) -> None:
    """No progress shown."""


def calibrate(
    repository: Repository,
    checkpoint_id: str,
    options: CalibrateOptions,
    progress: Progress = quiet,
    *,
    evidence: Evidence | None = None,
) -> CalibrateResult:
    """Write `specs/<id>/<policy>-<bits>.json` (+ tensors) and `reference.safetensors`; return what was decided.

    evidence: of an earlier call with the same samples, steps and seed, to be shared between policies.
    Raises RepositoryError or SpecError. progress(text, fraction 0..1) is called as the work goes on.
    """
    started = time.perf_counter()
    if options.policy not in FLOAT_POLICIES:
        rule_of(options.policy)
    if options.row_bits not in ROW_BITS:
        raise SpecError(f"row bits: must be one of {ROW_BITS}, got {options.row_bits}")
    card = repository.card(checkpoint_id)
    folder = repository.root / "specs" / folder_name(card.id)
    reference, sha256 = folder / REFERENCE, checkpoint_sha256(repository, card)
    checked = ""
    settings = settings_of(repository, card)
    if not is_current(reference, sha256, settings.scheduler):
        progress("comparing with diffusers' own loaders", 0.0)
        checked = checked_against(repository, card)  # before ours is loaded: one pipeline in memory at a time
    progress("loading the checkpoint", 0.0)
    evidence = evidence or gather(repository, card, options, progress)
    if checked:
        progress("running the FP32 reference", 0.0)
        told = {"checkpoint_sha256": sha256, "checked_against": checked, **settings.sampling()}
        write_reference(evidence.pipe, card, reference, scheduler=settings.scheduler, **told)
    checked = metadata_of(reference).get("checked_against", "not recorded")
    spec_file, kept = build_spec(repository, card, evidence, options, checked)
    path = spec_file.write(folder / f"{spec_file.spec.name}.json")
    if options.report is not None and options.policy not in FLOAT_POLICIES:
        write_atomic(options.report, report_html(evidence, spec_file.spec).encode())
    seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return CalibrateResult(path, spec_file, kept, len(spec_file.spec.layers), checked, seconds, peak)


def build_spec(
    repository: Repository, card: Card, evidence: Evidence, options: CalibrateOptions, checked: str
) -> tuple[SpecFile, tuple[str, ...]]:
    """Decide every layer and row from the evidence (none is collected when the policy quantises nothing).

    checked: which independent loader has the same weights, for the spec's provenance.
    """
    pipe = evidence.pipe
    layers_of_rows = tuple(layer.model_copy(update={"rest_bits": options.row_bits}) for layer in evidence.row_layers)
    if options.policy in FLOAT_POLICIES:
        modules = {n: LayerRanges.of(m) for n, m in quantisable_layers(pipe.unet).items()}
        decisions = Decisions(float_layers(modules, "reference: nothing is quantised"), {})
        rows, name = RowsSpec(kept=KeptTokens(slots=0), layers=layers_of_rows), options.policy
    else:
        rule = rule_of(options.policy)
        decisions = decide(evidence, rule, options.bits, options.budget_bytes)
        kept, reasons = rule.keep_rows(Tokens(evidence.recipe.trigger, evidence.recipe.class_noun), evidence.seen.rows)
        rows, name = RowsSpec(kept=kept, layers=layers_of_rows, reasons=reasons), spec_name(options)
    spec = Spec(
        name=name,
        policy=options.policy,
        bits=options.policy if options.policy in FLOAT_POLICIES else options.bits,
        checkpoint=card.id,
        family=family_key(read_configs(repository.base_dir(card))),
        storage=FLOAT_POLICIES.get(options.policy, "float16"),
        layers=decisions.layers,
        rows=rows,
        tuned=decisions.tuned,
        corrected=decisions.corrected,
        budget_bytes=options.budget_bytes,
        provenance=provenance(evidence, options, checked),
    )
    return SpecFile(spec, decisions.tensors), kept_words(rows.kept, pipe)


def spec_name(options: CalibrateOptions) -> str:
    """File name of a spec: '<policy>-<bits>', with the rows' bits when they are not 8, and the budget when there is one."""
    rows = "" if options.row_bits == 8 else f"-rows{options.row_bits}"
    budget = "" if options.budget_bytes is None else f"-{options.budget_bytes / 1e6:.2f}mb"
    return f"{options.policy}-{options.bits}{rows}{budget}"


def gather(repository: Repository, card: Card, options: CalibrateOptions, progress: Progress = quiet) -> Evidence:
    """Load the checkpoint and get ready to observe it; policies calibrated one after the other can share the result."""
    pipe = load_pipeline(repository, card)
    prompts = (
        () if options.policy in FLOAT_POLICIES else tuple(calibration_prompts(card, options.samples, options.seed))
    )
    tokens = card_tokens(pipe, card)
    guidance = settings_of(repository, card).guidance
    recipe = Recipe(prompts, tokens.trigger, tokens.class_noun, options.steps, guidance, options.seed)
    folder = repository.root / "specs" / folder_name(card.id)
    return Evidence(pipe, recipe, progress, folder / STATISTICS, checkpoint_sha256(repository, card))


def settings_of(repository: Repository, card: Card) -> Settings:
    """The checkpoint's scheduler, tokenizers and what else its author shipped."""
    return read_settings(repository.base_dir(card), repository.checkpoint_dir(card.id))


def checkpoint_sha256(repository: Repository, card: Card) -> str:
    """Hash of the base's and the checkpoint's weights."""
    return weights_sha256(repository.base_dir(card), repository.checkpoint_dir(card.id))


def float_layers(ranges: dict[str, LayerRanges], reason: str) -> dict[str, LayerSpec]:
    """Every layer unquantised: the reference policies."""
    return {
        name: LayerSpec(op=layer.op, weight="float", activation="float", reason=reason)
        for name, layer in ranges.items()
    }


def card_tokens(pipe: Pipe, card: Card) -> Tokens:
    """Token ids of the card's triggers and class noun, multi-vector triggers expanded as diffusers does."""

    def ids(text: str) -> tuple[int, ...]:
        text = pipe.maybe_convert_prompt(text, pipe.tokenizer)
        return tuple(pipe.tokenizer(text, add_special_tokens=False).input_ids)

    triggers = tuple(ids(group) for group in card.trigger if group.strip())
    return Tokens(triggers, (ids(card.class_noun),) if card.class_noun else ())


def kept_words(kept: KeptTokens, pipe: Pipe) -> tuple[str, ...]:
    """Human names of the kept rows, for the command line and reports."""
    words = [pipe.tokenizer.decode(sequence).strip() for sequence in kept.trigger]
    words += ["<BOS>"] if kept.bos else []
    words += [pipe.tokenizer.decode(sequence).strip() for sequence in kept.class_noun]
    return tuple(words + (["<EOS>"] if kept.eos else []) + (["<PAD>"] if kept.pad else []))


def provenance(evidence: Evidence, options: CalibrateOptions, checked: str) -> Provenance:
    prompts = list(evidence.recipe.prompts)
    return Provenance(
        checkpoint_sha256=evidence.checkpoint_sha256,
        prompts_sha256=prompts_sha256(prompts),
        prompts=len(prompts),
        timesteps=(options.steps,) if prompts else (),
        seeds=(options.seed,),
        versions={name: version(name) for name in ("torch", "diffusers", "transformers")},
        date=datetime.date.today().isoformat(),
        reference={"checked_against": checked},
    )

"""`personalq calibrate`: run a checkpoint over its own prompts, stream statistics, apply a policy, write spec and goldens.

A base is run over its own prompts and as its checkpoints make it (calibration.mixture); its spec's words are those of whatever
is attached later.
"""

import datetime
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from personalq.architecture import family_key, read_configs
from personalq.cards.card import Card, folder_name
from personalq.errors import SpecError
from personalq.repository import Repository
from personalq.repository.atomic import write_atomic
from personalq.repository.results import Whole
from personalq.rows import KeptTokens
from personalq.spec import REFERENCE, LayerSpec, Provenance, RowsSpec, Spec, SpecFile

from .decide import Decisions, decide, rule_of
from .gather import (
    FLOAT_POLICIES,
    CalibrateOptions,
    Progress,
    checkpoint_sha256,
    choice_of,
    gather,
    over_of,
    quiet,
    settings_of,
)
from .mixture.base_prompts import base_golden_prompts
from .model.conditioning import Pipe
from .model.independent import checked_against
from .model.pipeline import quantisable_layers
from .model.reference import golden_prompts, is_current, metadata_of, write_reference
from .policies import Tokens
from .prompts import prompts_sha256
from .report import report_html
from .statistics.evidence import Evidence
from .statistics.ranges import LayerRanges

ROW_BITS = (8, 4)


@dataclass(frozen=True)
class CalibrateResult:
    """over, left_out: the checkpoints that a base was run as, and those that it was not, with the reason."""

    spec_path: Path
    spec_file: SpecFile
    kept_tokens: tuple[str, ...]
    layers: int
    checked_against: str
    seconds: float
    peak_rss_bytes: int
    over: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, without the spec itself."""
        rest = {name: value for name, value in self.__dict__.items() if name not in ("spec_path", "spec_file")}
        told = {"kept_tokens": list(self.kept_tokens), "over": list(self.over), "left_out": dict(self.left_out)}
        return {"spec": str(self.spec_path), **rest, **told}


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
    whole = repository.whole(checkpoint_id)
    card, folder = whole.card, repository.root / "specs" / folder_name(whole.card.id)
    choice = choice_of(repository, whole, options)
    reference, sha256 = folder / REFERENCE, checkpoint_sha256(whole)
    checked = ""
    settings = settings_of(whole)
    if not is_current(reference, sha256, settings.scheduler):
        progress("comparing with diffusers' own loaders", 0.0)
        checked = checked_against(repository, card)  # before ours is loaded: one pipeline in memory at a time
    progress("loading the checkpoint", 0.0)
    evidence = evidence or gather(repository, card, options, progress, choice=choice)
    if checked:
        progress("running the FP32 reference", 0.0)
        told = {"checkpoint_sha256": sha256, "checked_against": checked, **settings.sampling()}
        prompts = golden_prompts(card)
        if whole.is_base:  # two pictures of many steps would take longer than all the rest at SD1.5's size
            prompts, told["steps"] = base_golden_prompts(whole.base_dir), min(settings.steps, options.steps)
        write_reference(evidence.pipe, prompts, reference, scheduler=settings.scheduler, **told)
    checked = metadata_of(reference).get("checked_against", "not recorded")
    spec_file, kept = build_spec(repository, card, evidence, options, checked)
    path = spec_file.write(folder / f"{spec_file.spec.name}.json")
    if options.report is not None and options.policy not in FLOAT_POLICIES:
        write_atomic(options.report, report_html(evidence, spec_file.spec).encode())
    seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    over, layers = tuple(over_of(evidence)), len(spec_file.spec.layers)
    return CalibrateResult(path, spec_file, kept, layers, checked, seconds, peak, over, choice.left_out)


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
        kept, reasons = rule.keep_rows(tokens_of(evidence, repository.whole(card.id)), evidence.seen.rows)
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


def float_layers(ranges: dict[str, LayerRanges], reason: str) -> dict[str, LayerSpec]:
    """Every layer unquantised: the reference policies."""
    return {
        name: LayerSpec(op=layer.op, weight="float", activation="float", reason=reason)
        for name, layer in ranges.items()
    }


def tokens_of(evidence: Evidence, whole: Whole) -> Tokens:
    """The words whose rows may be kept: the checkpoint's own, or those of whatever is attached to a base."""
    if whole.is_base:
        return Tokens(of_adapter=True)
    part = evidence.recipe.parts[0]
    return Tokens(part.trigger, part.class_noun)


def kept_words(kept: KeptTokens, pipe: Pipe) -> tuple[str, ...]:
    """Human names of the kept rows, for the command line and reports."""
    words = [f"<{name.upper()}>" for name in kept.of_adapter]
    words += [pipe.tokenizer.decode(sequence).strip() for sequence in kept.trigger]
    words += ["<BOS>"] if kept.bos else []
    words += [pipe.tokenizer.decode(sequence).strip() for sequence in kept.class_noun]
    return tuple(words + (["<EOS>"] if kept.eos else []) + (["<PAD>"] if kept.pad else []))


def provenance(evidence: Evidence, options: CalibrateOptions, checked: str) -> Provenance:
    prompts, over = list(evidence.recipe.prompts), over_of(evidence)
    return Provenance(
        checkpoint_sha256=evidence.checkpoint_sha256,
        prompts_sha256=prompts_sha256(prompts),
        prompts=len(prompts),
        timesteps=(options.steps,) if prompts else (),
        seeds=(options.seed,),
        versions={name: version(name) for name in ("torch", "diffusers", "transformers")},
        notes={"over": over} if over else {},
        date=datetime.date.today().isoformat(),
        reference={"checked_against": checked},
    )

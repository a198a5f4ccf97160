"""Level (c): does every output, block, layer and text row hold the numbers that torch computed in FP32?"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from personalq.goldens import POOLED
from personalq.numerics import cosine, psnr_db, snr_db
from personalq.rows import end_of_prompt, find_sequence

from ...drawing.samplers import Trail, plan_steps, predict, sampler_named
from ..check import LARGEST_DB, Check, at_least, at_most
from ..subject import Subject
from ..taps import golden_sizes, look
from .branches import branches_fit
from .limits import REST_ROW_SNR_DB

Float = npt.NDArray[np.float32]
TIME_BINS = ((750, 1001, "750-999"), (500, 750, "500-749"), (250, 500, "250-499"), (0, 250, "0-249"))
SAMPLER = "ddim"  # of the goldens' single steps
SCHEDULER_SNR_DB = 60.0  # float32 on both sides; another prediction type gives 10 dB or less
SMALLEST_MASS = 0.02  # of a layer's attention: under it, a share of the trigger's mass says nothing


def text_encoder(subject: Subject) -> Iterator[Check]:
    golden = subject.golden
    ids = np.stack([subject.pipeline.tokenizer.encode(prompt).ids for prompt in subject.prompts])
    yield at_most("token ids that differ", int((ids != golden["ids"]).sum()), 0)
    embeds = subject.pipeline.embed(subject.prompts)
    yield at_least("text encoder cosine", _worst(golden["text_embeds"], embeds.states), subject.limits.text_cosine)
    if embeds.pooled is not None:
        yield at_least("pooled text cosine", _worst(golden[POOLED], embeds.pooled), subject.limits.text_cosine)


def _worst(reference: Float, value: Float) -> float:
    """The lowest cosine of any prompt."""
    return min(cosine(r, v) for r, v in zip(reference, value, strict=True))


def text_rows(subject: Subject) -> Iterator[Check]:
    golden, slots = subject.golden, subject.manifest.rows.kept.slots
    index = np.zeros((1, slots), dtype=np.int64)
    worst = 1.0
    for i, embeds in enumerate(golden["text_embeds"]):
        rows = subject.engine.text_rows(embeds[None], index, subject.attached)["rows"][0]
        worst = min(worst, cosine(golden["rows"][i], rows))
    yield at_least("text rows cosine", worst, subject.limits.rows_cosine)


def rows_by_class(subject: Subject) -> Iterator[Check]:
    """SNR of the rows as the UNet reads them, by what they are: kept ones were rounded to FP16, the others to int8."""
    if subject.manifest.rows.form != "split":
        return
    bits = min(layer.rest_bits for layer in subject.manifest.rows.layers)
    for kind, pairs in _row_classes(subject).items():
        reference, value = (np.concatenate([pair[k] for pair in pairs]) for k in (0, 1))
        subject.measured[f"text rows SNR dB, {kind}"] = [_capped(snr_db(r, v)) for r, v in pairs]
        kept = kind.endswith("kept")
        limit = subject.limits.kept_row_snr_db if kept else REST_ROW_SNR_DB[bits]
        yield at_least(f"text rows SNR dB, {kind}", snr_db(reference, value), limit)


def _row_classes(subject: Subject) -> dict[str, list[tuple[Float, Float]]]:
    """'trigger, kept' -> for each golden prompt that has such rows: (golden rows, rows as read), both (n,R)."""
    found: dict[str, list[tuple[Float, Float]]] = {}
    text = subject.manifest.text
    noun = subject.pipeline.tokenizer.token_ids(subject.manifest.checkpoint.class_noun)
    for i, prompt in enumerate(subject.rows):
        ids = subject.golden["ids"][i].tolist()
        end = end_of_prompt(ids, text.eos_id)
        names = dict.fromkeys(range(len(ids)), "rest") | {0: "BOS", end: "EOS"}
        names |= dict.fromkeys(range(end + 1, len(ids)), "padding")
        names |= dict.fromkeys(find_sequence(ids[:end], noun), "class noun")
        names |= dict.fromkeys(subject.trigger_positions[i], "trigger")
        kinds = {p: f"{name}, kept" if p in prompt.kept else name for p, name in names.items()}
        golden, read = subject.golden["rows"][i], rows_as_read(subject, i)
        for kind in dict.fromkeys(kinds.values()):
            positions = [position for position, name in kinds.items() if name == kind]
            found.setdefault(kind, []).append((golden[positions], read[positions]))
    return found


def rows_as_read(subject: Subject, prompt: int) -> Float:
    """(77,R): rest rows dequantised, kept rows in their places."""
    conditioning, layers = subject.rows[prompt].conditioning, subject.manifest.rows.layers
    widths = np.repeat([layer.width for layer in layers], 2)
    scale = np.repeat(conditioning["rest_scale"][0], widths, axis=1)
    both = np.concatenate([conditioning["rest"][0].astype(np.float32) * scale, conditioning["kept"][0]])
    return np.asarray(both[conditioning["row_index"][0]], np.float32)


def noise_prediction(subject: Subject) -> Iterator[Check]:
    golden, limits = subject.golden, subject.limits
    predicted = np.stack([subject.noise_pred(subject.conditioning(n), n) for n in range(len(golden["prompt"]))])
    pairs = list(zip(golden["noise_pred"], predicted, strict=True))
    subject.measured["unet SNR dB"] = [_capped(snr_db(reference, value)) for reference, value in pairs]
    for low, high, name in TIME_BINS:
        chosen = [n for n, t in enumerate(golden["timestep"]) if low <= t < high]
        if not chosen:
            continue
        reference, value = golden["noise_pred"][chosen], predicted[chosen]
        peak = float(np.abs(reference).max())
        yield at_least(f"unet cosine, t {name}", cosine(reference, value), limits.cosine)
        yield at_least(f"unet SNR dB, t {name}", snr_db(reference, value), limits.snr_db)
        # a prediction is about normal: its peak is some 12 dB over its mean power
        yield at_least(f"unet PSNR dB, t {name}", psnr_db(reference, value, peak=peak), limits.snr_db + 6)


def scheduler_step(subject: Subject) -> Iterator[Check]:
    """One DDIM step from each golden prediction: prediction type, betas, spacing and clipping are the base's."""
    golden, schedule, worst = subject.golden, subject.pipeline.schedule, np.inf
    plan, sampler = plan_steps(SAMPLER, schedule, subject.steps), sampler_named(SAMPLER)
    for i, x, model_output, wanted in zip(
        golden["next_step"], golden["sample"], golden["noise_pred"], golden["next_sample"], strict=True
    ):
        said = predict(schedule, plan, int(i), x, model_output, schedule.clip)
        reached = sampler.step(schedule, plan, int(i), x, said, np.zeros_like(x), Trail())
        worst = min(worst, snr_db(wanted, reached))
    yield at_least("scheduler step SNR dB", worst, SCHEDULER_SNR_DB)


def decoder(subject: Subject) -> Iterator[Check]:
    decoded = subject.engine.decode(subject.golden["latent"])
    pairs = zip(subject.golden["decoded"], decoded, strict=True)
    subject.measured["vae PSNR dB"] = [_capped(psnr_db(r, v, peak=2.0)) for r, v in pairs]
    yield at_least("vae PSNR dB", psnr_db(subject.golden["decoded"], decoded, peak=2.0), subject.limits.vae_psnr_db)


def inside_the_unet(subject: Subject) -> Iterator[Check]:
    """SNR and cosine at every block and layer, and the drift of the trigger's attention."""
    golden, limits, seen = subject.golden, subject.limits, look(subject)
    references = {
        kind: dict(zip(golden_sizes(subject, kind), np.moveaxis(golden[kind], 1, 0), strict=True))
        for kind in ("layers", "blocks")
    }
    missing = sorted(set(subject.spec_file.spec.layers) ^ set(references["layers"]))
    yield at_most("layers without samples in the goldens", len(missing), 0, reason=", ".join(missing[:3]))
    snr = {kind: _snr_by_name(references[kind], getattr(seen, kind)) for kind in references}
    for kind in references:
        subject.layers |= _snr_of_each_input(references[kind], getattr(seen, kind))
    for kind in references:
        worst = min(snr[kind], key=snr[kind].__getitem__)
        yield at_least(f"{kind} SNR dB, worst", snr[kind][worst], limits.block_snr_db, reason=f"at {worst}")
    blocks = {name: cosine(references["blocks"][name], value) for name, value in seen.blocks.items()}
    lowest = min(blocks, key=blocks.__getitem__)
    yield at_least("blocks cosine, worst", blocks[lowest], limits.block_cosine, reason=f"at {lowest}")
    peaks = {n: psnr_db(v, seen.blocks[n], peak=float(np.abs(v).max())) for n, v in references["blocks"].items()}
    dimmest = min(peaks, key=peaks.__getitem__)
    yield at_least("blocks PSNR dB, worst", peaks[dimmest], limits.block_snr_db, reason=f"at {dimmest}")
    yield from _attention_drift(subject, seen.attention)
    if seen.branches:
        yield branches_fit(references["layers"], seen, limits.branch_stray)


def _snr_of_each_input(reference: dict[str, Float], value: dict[str, Float]) -> dict[str, list[float]]:
    return {
        name: [_capped(snr_db(r, v)) for r, v in zip(reference[name], found, strict=True)]
        for name, found in value.items()
    }


def _snr_by_name(reference: dict[str, Float], value: dict[str, Float]) -> dict[str, float]:
    return {name: _capped(snr_db(reference[name], found)) for name, found in value.items()}


def _attention_drift(subject: Subject, attention: Float) -> Iterator[Check]:
    """How far the share of attention that the trigger gets has moved, in the layer where it moved most."""
    golden = subject.golden["attention"]
    moved: dict[str, list[float]] = {layer.name: [] for layer in subject.manifest.rows.layers}
    for n, prompt in enumerate(subject.golden["prompt"]):
        columns = subject.trigger_positions[int(prompt)]
        before, after = (x[n][:, columns].sum(axis=1) for x in (golden, attention))
        for layer, b, a in zip(moved, before, after, strict=True):
            moved[layer] += [abs(float(a - b)) / max(float(b), SMALLEST_MASS)] if columns else []
    drift = {layer: float(np.mean(values)) for layer, values in moved.items() if values}
    if drift:
        worst = max(drift, key=drift.__getitem__)
        subject.measured["attention drift on trigger columns"] = list(drift.values())
        limit = subject.limits.attention_drift
        yield at_most("attention drift on trigger columns, worst", drift[worst], limit, reason=f"at {worst}")


def _capped(value: float) -> float:
    return min(value, LARGEST_DB)

"""Policies: named rules that turn evidence into the decisions of a spec. All of them pass through the same exporter.

Each names its source and where it deviates from it in order to be exportable (symmetric scales, static activations, one scale per
output channel: what TensorRT and ONNX Runtime run as integers). Controls differ from `taq` in exactly one respect.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from personalq.rows import KeptTokens

from .statistics.ranges import EVEN, N_TIME_BINS
from .statistics.text_rows import RowStatistics


@dataclass(frozen=True)
class Tokens:
    """Token-id sequences of the card's words, for the kept rows. of_adapter: a base's, whose words are still to come."""

    trigger: tuple[tuple[int, ...], ...] = ()
    class_noun: tuple[tuple[int, ...], ...] = ()
    of_adapter: bool = False

    def kept(self, *, trigger: bool = False, class_noun: bool = False, **others: bool) -> KeptTokens:
        """Rows to keep: the words where they are wanted, and other classes by name."""
        wanted = {"trigger": trigger, "class_noun": class_noun}
        if self.of_adapter:
            return KeptTokens(of_adapter=tuple(name for name, value in wanted.items() if value), **others)
        words = {name: getattr(self, name) if value else () for name, value in wanted.items()}
        return KeptTokens(**words, **others)


KeepRows = Callable[[Tokens, RowStatistics], tuple[KeptTokens, dict[str, str]]]


def no_rows(tokens: Tokens, rows: RowStatistics) -> tuple[KeptTokens, dict[str, str]]:
    """Keep nothing."""
    return KeptTokens(), {}


@dataclass(frozen=True)
class Rule:
    """How a policy finds scales, rounds, spends a byte budget and keeps rows.

    rounding: 'nearest', 'gptq' or 'adaround' (below 8 bits); weighting: which errors count, 'plain' or 'trigger' (pixels
    weighted by attention). balance: '', 'smooth' or 'shortcut'. time_weights: how much each time-step bin counts in the
    ranges. low_rank: rank of a float branch by weight shape. tune, corrected, decoupled: see rounding.finish and decide.
    """

    source: str
    weight_scale: str = "mse"
    activation_scale: str = "mse"
    rounding: str = "nearest"
    weighting: str = "plain"
    keep_rows: KeepRows = no_rows
    keep_float: Callable[[str], str] = lambda name: ""
    balance: str = ""
    time_weights: tuple[float, ...] = EVEN
    low_rank: Callable[[tuple[int, ...]], int] = lambda shape: 0
    tune: bool = False
    corrected: bool = False
    decoupled: bool = False


def edges(name: str) -> str:
    """The first and last convolution: 4 latent channels, a few KB, and every error in them reaches the picture directly."""
    if name in ("conv_in", "conv_out"):
        return "first or last layer: 4 latent channels, few bytes, its error is the picture's error"
    return ""


def edges_and_time(name: str) -> str:
    """TFMQ-DM's temporal information block: the time embedding and every ResBlock's projection of it."""
    if name.startswith("time_embedding.") or name.endswith("time_emb_proj"):
        return "temporal information block (TFMQ-DM)"
    return edges(name)


def trigger_and_measured(tokens: Tokens, rows: RowStatistics) -> tuple[KeptTokens, dict[str, str]]:
    """Keep the trigger; keep BOS, class noun, EOS or the first padding row if attention times error is above average.

    A class is kept when the mean over layers of (its share of attention per row) x (its 8-bit error) exceeds the mean
    over all 77 rows: the rows where one slot saves the most.
    """
    numbers = rows.by_class()
    harm = {
        name: value["mass"] / max(rows.rows_per_prompt(name), 1) * value["error8"] for name, value in numbers.items()
    }
    average = sum(value["mass"] * value["error8"] for value in numbers.values()) / 77
    wanted = {name: harm.get(name, 0.0) > average for name in ("bos", "class_noun", "eos", "pad")}
    reasons = {"trigger": "carries the concept"}
    for name in wanted:
        if name in numbers:
            verdict = "kept" if wanted[name] else "not kept"
            reasons[name] = (
                f"{verdict}: attention x 8-bit error is {harm[name] / max(average, 1e-30):.1f} x the average row's"
            )
    return tokens.kept(trigger=True, **wanted), reasons


def fixed(reason: str, **kept: bool) -> KeepRows:
    """Keep these classes whatever was measured; `trigger=True` stands for the card's trigger."""

    def keep(tokens: Tokens, _: RowStatistics) -> tuple[KeptTokens, dict[str, str]]:
        return tokens.kept(**kept), {"control": reason}

    return keep


def random_rows(tokens: Tokens, rows: RowStatistics) -> tuple[KeptTokens, dict[str, str]]:
    """As many rows as `taq` keeps, drawn by seed."""
    kept, _ = trigger_and_measured(tokens, rows)
    return kept.model_copy(update={"random_seed": 0}), {"control": "random rows, as many as taq keeps"}


def normally_distributed_time(mean: float = 0.4, deviation: float = 0.5) -> tuple[float, ...]:
    """PTQ4DM's NDTC: calibration time steps ~ N(mean T, deviation T), as a weight per time-step bin with mean 1.

    (arXiv 2211.15736, section 3.3: mean at most T/2, deviation T/2; here every step is seen and its share is weighed.)
    """
    centres = (np.arange(N_TIME_BINS) + 0.5) / N_TIME_BINS
    density = np.exp(-0.5 * ((centres - mean) / deviation) ** 2)
    return tuple(float(w) for w in density / density.mean())


def rank_of(shape: tuple[int, ...]) -> int:
    """SVDQuant's rank 32 for 3072-wide layers, in proportion: 1/64 of the narrower side, at least 1."""
    return max(1, min(shape) // 64)


TAQ = Rule(
    source="this project: MSE clips, GPTQ with the Hessian weighted by where the trigger attends, scales, biases and norms "
    "tuned on the guided prediction with the same weights, measured kept rows",
    tune=True,
    rounding="gptq",
    weighting="trigger",
    keep_rows=trigger_and_measured,
    keep_float=edges,
)
POLICIES: dict[str, Rule] = {
    "taq": TAQ,
    "rtn": Rule(
        source="round to nearest, absmax weights and activations; the usual first export",
        weight_scale="absmax",
        activation_scale="absmax",
    ),
    "minmax": Rule(
        source="min-max ranges as MixDQ's (arXiv 2405.17873) tensors; edges kept",
        weight_scale="absmax",
        activation_scale="absmax",
        keep_float=edges,
    ),
    "mse": Rule(source="MSE-optimal clips per channel and tensor (Q-Diffusion's initialisation)", keep_float=edges),
    "q-diffusion": Rule(
        source="Q-Diffusion (ICCV'23, arXiv 2302.04304): MSE initialisation, AdaRound, split shortcut. Deviates: AdaRound by "
        "layer on second moments, symmetric, weight halves of a shortcut share their scale, attention products float",
        rounding="adaround",
        balance="shortcut",
        keep_float=edges,
    ),
    "gptq": Rule(
        source="GPTQ (ICLR'23, arXiv 2210.17323) on every layer, MSE clips. Deviates: scale per output channel, no groups",
        rounding="gptq",
        keep_float=edges,
    ),
    "smoothquant": Rule(
        source="SmoothQuant (ICML'23, arXiv 2211.10438), strength 0.5, on Linear layers; GPTQ below 8 bits",
        weight_scale="mse",
        activation_scale="absmax",
        rounding="gptq",
        balance="smooth",
        keep_float=edges,
    ),
    "ptq4dm": Rule(
        source="PTQ4DM (CVPR'23, arXiv 2211.15736): time steps N(0.4 T, T/2), MSE ranges. Deviates: steps are weighed, not drawn",
        time_weights=normally_distributed_time(),
        keep_float=edges,
    ),
    "ptqd": Rule(
        source="PTQD (NeurIPS'23, arXiv 2305.10657): correlated part and mean of the error taken out of the prediction, on top "
        "of MSE + AdaRound. Deviates: per time-step bin, in the graph; no variance to absorb in a deterministic sampler",
        rounding="adaround",
        corrected=True,
        keep_float=edges,
    ),
    "tfmq": Rule(
        source="TFMQ-DM (CVPR'24, arXiv 2311.16503): temporal block kept, MSE + AdaRound. Deviates: one activation set for "
        "all steps",
        rounding="adaround",
        keep_float=edges_and_time,
    ),
    "mixdq": Rule(
        source="MixDQ (ECCV'24, arXiv 2405.17873): BOS rows kept, min-max; with a budget, content and quality layers share it "
        "apart. Deviates: noise-prediction error stands for both of its metrics",
        weight_scale="absmax",
        activation_scale="absmax",
        keep_rows=fixed("MixDQ keeps the BOS row", bos=True),
        keep_float=edges,
        decoupled=True,
    ),
    "dgq": Rule(
        source="DGQ (ICLR'25, arXiv 2501.04304): the start token's row kept, AdaRound weights. Deviates: K and V both kept (it "
        "keeps K only), attention weights stay float altogether, one activation group per tensor",
        rounding="adaround",
        keep_rows=fixed("DGQ keeps the start token's row", bos=True),
        keep_float=edges,
    ),
    "svdquant-like": Rule(
        source="SVDQuant (ICLR'25, arXiv 2411.05007): smoothing, a float16 low-rank branch beside each Linear, GPTQ of the rest. "
        "Deviates: rank in proportion to width, one scale per output channel, static int8 activations, convolutions too",
        rounding="gptq",
        balance="smooth",
        low_rank=rank_of,
        keep_float=edges,
    ),
    "bos-only": replace(TAQ, source="control: taq, rows of BOS only", keep_rows=fixed("BOS only", bos=True)),
    "random-rows": replace(TAQ, source="control: taq, random rows", keep_rows=random_rows),
    "trigger-only": replace(
        TAQ, source="control: taq, rows of the trigger only", keep_rows=fixed("trigger only", trigger=True)
    ),
    "trigger+eos": replace(
        TAQ, source="control: taq, rows of trigger and EOS", keep_rows=fixed("trigger and EOS", trigger=True, eos=True)
    ),
    "no-rows": replace(TAQ, source="control: taq, no row kept", keep_rows=fixed("no row kept")),
    "all-rows": replace(
        TAQ,
        source="control: taq, all 77 rows FP16",
        keep_rows=lambda tokens, rows: (KeptTokens(slots=77, everything=True), {"control": "all rows"}),
    ),
    "taq-unweighted": replace(TAQ, source="control: taq, every pixel counts the same", weighting="plain"),
    "taq-untuned": replace(TAQ, source="control: taq without the tuning stage", tune=False),
}

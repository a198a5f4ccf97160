"""Rows patched on their way to the UNet: which positions change, what a share of a gain is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench.leak import SETS, shares, without_trigger
from bench.rows import PARTS, choices, degraded, gains, table
from personalq.numerics import QType
from personalq.rows import RowLayer

INT4 = QType("int4", 4)
LAYERS = (RowLayer(name="a", width=4, offset=0), RowLayer(name="b", width=6, offset=8))


def manifest() -> Any:
    return SimpleNamespace(rows=SimpleNamespace(layers=LAYERS))


@pytest.fixture
def rows() -> Any:
    return np.random.default_rng(0).standard_normal((1, 77, 20)).astype(np.float32)


@pytest.mark.parametrize("part", PARTS)
def test_only_rows_that_are_not_kept_and_only_their_part_is_quantised(rows: Any, part: str) -> None:
    worse = degraded(rows, manifest(), (0, 5), PARTS[part], INT4)
    changed = worse != rows
    assert not changed[0, [0, 5]].any()
    columns = {"K": [*range(4), *range(8, 14)], "V": [*range(4, 8), *range(14, 20)]}
    touched = columns["K"] + columns["V"] if part == "K+V" else columns[part]
    assert changed[0, 1][touched].any()
    assert not changed[0][:, [c for c in range(20) if c not in touched]].any()


def test_keeping_every_row_changes_nothing(rows: Any) -> None:
    assert np.array_equal(degraded(rows, manifest(), tuple(range(77)), (0, 1), INT4), rows)


def test_the_ablation_has_the_seven_choices_and_random_keeps_as_many_rows_as_trigger_and_bos() -> None:
    kept = choices(((7,),))
    assert list(kept) == ["none", "BOS", "random", "trigger", "trigger+BOS", "trigger+EOS", "all"]
    assert kept["random"].model_copy(update={"random_seed": None}) == kept["trigger+BOS"]


def ablation() -> list[dict[str, Any]]:
    """Two checkpoints, where keeping the trigger saves 2 dB and random rows nothing."""
    better = {"trigger": 2.0, "trigger+BOS": 2.0, "trigger+EOS": 2.0}
    return [
        {
            "checkpoint": c,
            "kept": kept,
            "part": part,
            "psnr_db": [30 + better.get(kept, 0.0), 31 + better.get(kept, 0.0)],
            "concept": [0.5, 0.6],
        }
        for c in "xy"
        for kept in choices(())
        for part in PARTS
        if kept != "all" or part == "K+V"
    ]


def test_gains_are_paired_so_that_pictures_of_unlike_difficulty_do_not_blur_them() -> None:
    found = {(g["a"], g["b"], g["metric"]): g for g in gains(ablation())}
    won = found["trigger", "random", "psnr_db"]
    assert won["mean"] == won["low"] == won["high"] == pytest.approx(2.0)
    assert found["BOS", "none", "psnr_db"]["mean"] == 0


def test_the_table_has_a_line_a_choice_and_no_number_where_nothing_was_measured() -> None:
    lines = list(table(ablation(), "psnr_db", 1))
    assert lines[2].startswith("| none | 30.5 (")
    assert lines[-1].startswith("| all |  |  | 30.5 (")


def test_the_plain_prompt_has_the_plain_word_in_each_of_the_triggers_places() -> None:
    ids = np.array([1, 5, 6, 7, 2])
    assert without_trigger(ids, ["bos", "before", "trigger", "trigger", "eos"], 9).tolist() == [1, 5, 9, 9, 2]


def test_a_share_is_of_the_whole_gain_and_a_checkpoint_that_gains_nothing_does_not_blow_it_up() -> None:
    score = {"none": 0.0, "trigger": 0.3, "all": 0.6}
    rows = [
        {"checkpoint": c, "moved": name, "concept": [base + scale * score.get(name, 0.0)] * 2}
        for c, base, scale in (("x", 0.2, 1.0), ("y", 0.8, 1e-6))
        for name in SETS
    ]
    found = {each["moved"]: each["share"]["mean"] for each in shares(rows)}
    assert found["trigger"] == pytest.approx(0.5) and found["all"] == 1 and found["eos"] == 0

"""Row classes and their statistics: named right, streamed right, and kept only where the numbers say so."""

import numpy as np
import pytest

from calibration.policies import POLICIES, Tokens, trigger_and_measured
from calibration.statistics.text_rows import CLASSES, Moments, RowStatistics, row_classes
from personalq.rows import pack_layers

BOS, EOS, SKS, DOG, A, BEACH = 90, 91, 7, 8, 1, 2
IDS = [BOS, A, SKS, DOG, BEACH, EOS, EOS, EOS]


def test_every_row_gets_its_class():
    expected = ["bos", "before", "trigger", "class_noun", "after", "eos", "pad", "pad"]
    assert row_classes(IDS, [(SKS,)], [(DOG,)], EOS) == expected


def test_words_of_a_prompt_without_trigger_come_before_it():
    assert row_classes([BOS, A, BEACH, EOS, EOS], [(SKS,)], [(DOG,)], EOS) == ["bos", "before", "before", "eos", "pad"]


def test_kurtosis_is_three_for_a_gaussian_and_memory_is_flat():
    moments, generator = Moments(), np.random.default_rng(0)
    for _ in range(20):
        moments.add(generator.standard_normal((50, 64)).astype(np.float32) + 5)
    assert moments.kurtosis == pytest.approx(3.0, abs=0.1)
    assert moments.sums.size == 4


def statistics(mass: dict[str, float], outlier: str = "") -> RowStatistics:
    rows = RowStatistics(pack_layers([("layer", 16)]), 5)
    classes = row_classes(IDS, [(SKS,)], [(DOG,)], EOS)
    values = np.random.default_rng(0).standard_normal((len(IDS), 32)).astype(np.float32)
    for i, name in enumerate(classes):
        if name == outlier:
            values[i, ::16] *= 300
    rows.add_rows(values, classes)
    share = np.array([mass.get(name, 0.0) / classes.count(name) for name in classes])
    rows.add_mass(0, 0, share, classes)
    return rows


def test_a_class_is_kept_when_attention_times_error_is_above_the_average_row():
    tokens = Tokens(((SKS,),), ((DOG,),))
    kept, reasons = trigger_and_measured(tokens, statistics({"class_noun": 0.6, "pad": 0.4}))
    assert kept.trigger == ((SKS,),)
    assert kept.class_noun == ((DOG,),)
    assert not kept.bos
    assert "not kept" in reasons["bos"]


def test_attention_shares_add_up_to_one():
    rows = statistics({"trigger": 0.3, "pad": 0.7})
    assert rows.mean_mass()[0, 0].sum() == pytest.approx(1.0)
    assert rows.mean_mass().shape == (1, 5, len(CLASSES))


def test_policies_differ_where_they_must():
    tokens, rows = Tokens(((SKS,),), ((DOG,),)), statistics({"trigger": 1.0})
    kept = {name: POLICIES[name].keep_rows(tokens, rows)[0] for name in POLICIES}
    assert kept["bos-only"].bos and not kept["bos-only"].trigger
    assert kept["trigger-only"].trigger and not kept["trigger-only"].bos
    assert kept["trigger+eos"].eos
    assert kept["all-rows"].everything and kept["all-rows"].slots == 77
    assert kept["random-rows"].random_seed == 0
    assert not kept["rtn"].trigger
    assert POLICIES["taq-unweighted"].weighting == "plain" and POLICIES["taq"].weighting == "trigger"
    assert all(rule.source for rule in POLICIES.values())

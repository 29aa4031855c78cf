"""What few seeds can say, against formulas worked out by hand, scipy's own tests and simulation."""

import math

import numpy as np
import pandas as pd
import pytest
from made_results import make_results, write
from scipy.stats import ttest_rel

from sts.pipeline.report import tables
from sts.pipeline.report.compare import compare, time_at
from sts.pipeline.report.results import scores
from sts.pipeline.report.statistics import detectable, difference, holm, power, ratio

VALUES = pd.Series([0.81, 0.79, 0.84, 0.80, 0.77, 0.83])
BASE = pd.Series([0.84, 0.83, 0.83, 0.84, 0.82, 0.85])


def test_a_difference_is_paired_and_has_a_p_value_from_six_seeds_on():
    cells = difference("x", VALUES, BASE)
    test = ttest_rel(VALUES, BASE)
    low, high = test.confidence_interval(0.95)
    assert cells["x"] == pytest.approx((VALUES - BASE).mean()) and cells["x_n"] == 6
    assert [cells["x_low"], cells["x_high"]] == pytest.approx([low, high])
    assert cells["x_p"] == pytest.approx(test.pvalue)
    assert difference("x", VALUES[:5], BASE)["x_p"] == "n/a"
    assert difference("x", VALUES[:1], BASE)["x_low"] == "n/a"
    assert difference("x", VALUES[:0], BASE) == {}


def test_the_interval_of_a_ratio_is_the_same_the_other_way_round():
    there, back = ratio("r", VALUES, BASE), ratio("r", BASE, VALUES)
    assert there["r"] == pytest.approx(1 / back["r"])
    assert there["r_low"] == pytest.approx(1 / back["r_high"])
    assert ratio("r", VALUES, BASE * 0) == {"r": "n/a"}


def test_holm_by_hand():
    p_values = {"a": 0.01, "b": 0.04, "c": 0.03}
    assert holm(p_values) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}


@pytest.mark.parametrize("n", [3, 6, 10])
def test_power_is_the_share_of_simulated_trials_that_find_the_difference(n):
    draws = np.random.default_rng(0).normal(1.0, 1.0, (20_000, n))
    t = draws.mean(1) / (draws.std(1, ddof=1) / math.sqrt(n))
    critical = {3: 4.3027, 6: 2.5706, 10: 2.2622}[n]
    assert power(1.0, n) == pytest.approx((np.abs(t) > critical).mean(), abs=0.01)
    assert power(detectable(n), n) == pytest.approx(0.8)


def test_time_goes_in_equal_parts_of_a_stage():
    timed = {"steps": 100, "step_s": [1.0, 3.0], "stage_s": 200.0}
    assert [time_at(timed, step) for step in (0, 25, 50, 75, 100)] == [0, 25, 50, 125, 200]


@pytest.fixture
def measured(tmp_path):
    """Two seeds of dense and sts with held-out losses at four points, and their timing."""
    folder = make_results(tmp_path / "results/mini")
    losses = {
        "dense": {0: [1.0, 0.7, 0.5, 0.30], 1: [1.0, 0.7, 0.5, 0.40]},  # 0.35 at the end
        "sts": {0: [0.9, 0.5, 0.30, 0.25], 1: [0.9, 0.6, 0.45, 0.36]},
    }
    timed = {"align": {"stage_s": 20.0}, "instruct": {"steps": 40, "step_s": [2.0], "stage_s": 80}}
    sparse = {"align": {"stage_s": 10.0}, "instruct": {"steps": 40, "step_s": [1.0, 2.0]}}
    flops = {"flops": {"align": 1, "instruct": 1}}
    variants = {"dense": timed | flops | {"time_s": 100.0}, "sts": sparse | flops | {"time_s": 70}}
    write(folder / "bench/main.json", {"variants": variants})
    for id, seeds in losses.items():
        for seed, points in seeds.items():
            rows = [
                {"step": 10 * (i + 1), "loss": loss, "skills": {}} for i, loss in enumerate(points)
            ]
            run = folder / f"runs/{id}/seed{seed}"
            write(run / "instruct.json", {"held_out": rows, "precision": "fp32"})
    return folder


def test_the_held_out_loss_and_the_time_to_the_baselines(measured):
    ids = ["dense", "sts"]
    rows = compare(scores(measured, ids), measured, dict.fromkeys(ids, "dense"), "main")
    assert rows["dense"]["loss"] == pytest.approx(0.35)
    assert rows["sts"]["loss_difference"] == pytest.approx((0.25 - 0.30 + 0.36 - 0.40) / 2)
    # seed 0 crosses 0.35 between step 20 (0.5) and 30 (0.3), at 27.5: 10 + 20 + 7.5 x 2 seconds
    assert rows["sts"]["time_to_loss"] == pytest.approx(0.45)
    assert rows["sts"]["time_to_loss_n"] == 1, "the other seed never gets there"


def test_the_table_of_differences_has_more_pairs_and_says_what_its_seeds_can(measured):
    stem, ids = measured / "tables/main", ["dense", "sts"]
    tables.table("main", measured, ids, stem, beside=[("dense", "sts")])
    main, differences = stem.with_suffix(".md").read_text().split("### Differences")
    assert "| Loss |" in main and "| 0.350 ± 0.071 |" in main
    head, _, *body = [line for line in differences.splitlines() if line.startswith("|")]
    assert head.split(" | ")[3] == "Held-out loss, nats" and "| p |" not in head
    assert [line.split(" | ")[:3] for line in body] == [
        ["| sts", "dense", "2"],
        ["| dense", "sts", "2"],
    ]
    assert "-0.045 (" in body[0] and "+0.045 (" in body[1]
    assert "45" in body[0].split(" | ")[-1] and "1 of 2 seeds" in body[0]
    assert (
        "2 seeds find a difference of one standard deviation with a chance of 0.09" in differences
    )
    single = tables.table("main", measured, ["dense"], stem)
    assert single is None and "Differences" not in stem.with_suffix(".md").read_text()

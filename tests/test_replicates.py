from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from workbench.datasets.frames import DataError
from workbench.replicates import (
    EXACT_SEEDS,
    LABELS,
    check_rows,
    common_seeds,
    exact_test_is_silent,
    higher_is_better,
    label_of,
    lacking,
    paired,
    relative_differences,
    sentence,
    smallest_p,
    spread,
    summarise,
)


def table(**by_setting: dict[str, list[float]]) -> pd.DataFrame:
    """One row per setting and seed, seeds from 0."""
    parts = [
        pd.DataFrame({"setting": name, "seed": range(len(next(iter(figures.values()))))} | figures)
        for name, figures in by_setting.items()
    ]
    return pd.concat(parts, ignore_index=True)


def two(a: list[float], b: list[float]) -> pd.DataFrame:
    return table(A={"mse": a}, B={"mse": b})


def normal(n: int, shift: float, seed: int = 0) -> pd.DataFrame:
    x, y = np.random.default_rng(seed).normal(1, 0.1, (2, n))
    return two((x + shift).tolist(), y.tolist())


# --- the table ---


def test_means_and_deviations_by_setting_in_their_order() -> None:
    rows = table(
        V2={"mse": [1.0, 2.0, 6.0], "kl_mean": [1.0, 2.0, 3.0]}, V1={"mse": [3.0, 3.0], "kl_mean": [np.nan] * 2}
    )
    summary = summarise(rows.assign(run="x", parameters=7))
    assert list(summary.index) == ["V2", "V1"] and summary["seeds"].tolist() == [3, 2]
    assert list(summary)[1:] == ["mse", "mse_sd", "kl_mean", "kl_mean_sd", "parameters", "parameters_sd"]
    assert summary.loc["V2", ["mse", "mse_sd"]].tolist() == pytest.approx([3, np.sqrt(7)])
    assert summary.loc["V1", ["mse", "mse_sd", "parameters"]].tolist() == [3, 0, 7]
    assert summary.loc["V1", ["kl_mean", "kl_mean_sd"]].isna().all()


def test_a_figure_that_one_run_lacks_has_no_mean() -> None:
    """The mean of the runs that have it would be taken for the mean of all."""
    summary = summarise(two([1.0, np.nan, 3.0], [1.0, 2.0, 3.0]))
    assert np.isnan(summary.loc["A", "mse"]) and np.isnan(summary.loc["A", "mse_sd"])
    assert summary.loc["B", "mse"] == 2 and np.isnan(summarise(two([1.0], [2.0])).loc["A", "mse_sd"])


@pytest.mark.parametrize(
    ("mean", "deviation", "text"),
    [
        (0.012346, 0.00067, "0.01235 ± 0.00067"),
        (0.5, np.nan, "0.5"),
        (np.nan, np.nan, "–"),
        (1234567.0, 0.0, "1,234,567"),
        (0.25, 0.0, "0.25"),
        (0.1, 1.4e-17, "0.1"),
    ],
)
def test_a_spread_in_words(mean: float, deviation: float, text: str) -> None:
    assert spread(mean, deviation) == text


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (pd.DataFrame({"setting": ["A"]}), r"table of 1 runs without \['seed'\]: must have setting, seed and a run"),
        (pd.DataFrame({"setting": [], "seed": []}), "table of 0 runs without a row: must have"),
        (pd.DataFrame({"setting": [4], "seed": [0]}), "setting must be text and seed a whole number"),
        (pd.DataFrame({"setting": ["A"], "seed": [0.5]}), "setting must be text and seed a whole number"),
        (
            pd.DataFrame({"setting": ["A", "A"], "seed": [1, 1]}),
            "A with seed 1 is there more than once: must be one run",
        ),
    ],
)
def test_a_table_that_is_not_one_row_per_run_is_refused(rows: pd.DataFrame, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_rows(rows)


def test_every_figure_has_a_label_and_a_direction() -> None:
    assert label_of("iou_wall") == "IoU of wall [1]" and label_of("mse") == LABELS["mse"] and label_of("x") == "x"
    assert [name for name in LABELS if higher_is_better(name)] == [
        *("psnr", "ssim", "pixel_accuracy", "mean_iou", "colour_accuracy", "colour_mean_iou", "type_accuracy")
    ]
    assert higher_is_better("iou_wall") and not higher_is_better("kl_mean")


# --- pairs ---


@pytest.mark.parametrize("n", [2, 3, 7])
def test_the_interval_is_that_of_the_paired_t_test(n: int) -> None:
    rows = normal(n, 0.3, seed=n)
    pair, x, y = paired(rows, "mse", "A", "B"), *(rows.loc[rows["setting"] == s, "mse"] for s in "AB")
    reference = stats.ttest_rel(x, y).confidence_interval(0.95)
    assert (pair.low, pair.high) == pytest.approx((reference.low, reference.high))
    assert pair.difference == pytest.approx(x.mean() - y.mean())
    assert (pair.mean_a, pair.mean_b) == pytest.approx((x.mean(), y.mean()))


def test_two_seeds_in_closed_form() -> None:
    """Differences 1 and 3: mean 2, standard error 1, 97.5 % quantile of Student's t with 1 degree 12.7062."""
    pair = paired(two([1.0, 3.0], [0.0, 0.0]), "mse", "A", "B")
    assert (pair.difference, pair.low, pair.high) == pytest.approx((2, -10.7062, 14.7062), abs=1e-4)
    assert pair.agree == 2 and pair.p == 0.5 and not pair.distinguishable


@pytest.mark.parametrize("n", [2, 5, 8])
def test_the_exact_p_is_the_share_of_sign_changes_as_far_from_0(n: int) -> None:
    rows = normal(n, 0.05, seed=n)
    x, y = (rows.loc[rows["setting"] == s, "mse"].to_numpy() for s in "AB")
    means = [abs(np.mean(np.multiply(signs, x - y))) for signs in product((1, -1), repeat=n)]
    share = np.mean([mean >= abs(np.mean(x - y)) - 1e-12 for mean in means])
    assert paired(rows, "mse", "A", "B").p == pytest.approx(share)


@pytest.mark.parametrize("n", [2, 3, 5, 6, EXACT_SEEDS])
def test_differences_of_one_sign_have_the_smallest_p(n: int) -> None:
    pair = paired(normal(n, 3.0), "mse", "A", "B")
    assert pair.p == pytest.approx(smallest_p(n)) == 2 / 2**n and pair.agree == n
    assert pair.exact_decides == (n >= 6) and pair.distinguishable


def test_above_so_many_seeds_the_interval_alone_speaks() -> None:
    pair = paired(normal(EXACT_SEEDS + 1, 3.0), "mse", "A", "B")
    assert np.isnan(pair.p) and not pair.exact_decides and pair.distinguishable
    assert "17 seeds are too many for the exact test (up to 16), so the interval alone speaks" in sentence(pair)
    assert [n for n in range(1, 20) if not exact_test_is_silent(n)] == list(range(6, 17))


def test_where_the_exact_test_can_decide_it_must_agree() -> None:
    """One difference of six against the others: the interval leaves 0 out, but 4 of 64 sign changes are as far."""
    d = np.array([-0.1, 0.9, 1.0, 1.1, 1.0, 0.9])
    pair = paired(two(d.tolist(), [0.0] * 6), "mse", "A", "B")
    assert pair.low > 0 and pair.exact_decides and pair.p == 4 / 64 and not pair.distinguishable


def test_equal_runs_are_not_told_apart_and_a_constant_difference_is() -> None:
    same = paired(two([1.0] * 3, [1.0] * 3), "mse", "A", "B")
    assert (same.difference, same.low, same.high, same.p, same.agree) == (0, 0, 0, 1, 3) and not same.distinguishable
    assert "equal on 3 of 3" in sentence(same)
    constant = paired(two([1.5] * 3, [1.0] * 3), "mse", "A", "B")
    assert (constant.low, constant.high) == (0.5, 0.5) and constant.distinguishable


def test_pairs_are_by_seed_whatever_the_order_and_lone_seeds_are_named() -> None:
    rows = two([1.0, 20.0, 300.0], [0.0, 18.0, 297.0]).sample(frac=1, random_state=3)
    pair = paired(rows, "mse", "A", "B")
    assert pair.seeds == (0, 1, 2) and pair.values_a == (1, 20, 300) and pair.unpaired == ()
    assert np.subtract(pair.values_a, pair.values_b).tolist() == [1, 2, 3]
    lone = rows[~((rows["setting"] == "B") & (rows["seed"] == 1))]
    pair = paired(pd.concat([lone, pd.DataFrame({"setting": ["B"], "seed": [7], "mse": [np.nan]})]), "mse", "A", "B")
    assert pair.seeds == (0, 2) and pair.unpaired == (1, 7) and pair.difference == 2
    assert sentence(pair).endswith("; seeds left out, as only one has them: 1, 7")


def test_no_common_seed_and_unknown_settings_are_refused() -> None:
    rows = two([1.0, 2.0], [1.0, 2.0])
    rows.loc[rows["setting"] == "B", "seed"] += 5
    with pytest.raises(DataError, match=r"no seed common to all of 2 settings \(A has 0, 1; B has 5, 6\): must be at"):
        paired(rows, "mse", "A", "B")
    for names in (("A", "C"), ("A", "A"), ("A",)):
        with pytest.raises(
            DataError, match=f"settings {', '.join(names)}: must be at least two, all different, of A, B"
        ):
            common_seeds(rows, *names)


def test_a_figure_that_is_not_there_is_refused_by_name() -> None:
    rows = two([1.0, np.nan, np.inf], [1.0, 2.0, 3.0]).assign(kl_mean=[np.nan] * 3 + [1.0] * 3)
    assert lacking(rows, "mse", "A", "B") == "mse: A with seed 1, 2 has no such figure"
    assert lacking(rows, "kl_mean", "A", "B") == "kl_mean: A has no such figure"
    assert lacking(rows, "kl_mean", "B") == ""
    assert lacking(rows, "ppl", "A", "B") == "ppl: A has no such figure, B has no such figure"
    with pytest.raises(DataError, match="mse: A with seed 1, 2 has no such figure; choose another figure, or leave"):
        paired(rows, "mse", "A", "B")


# --- sentences ---


def test_below_above_and_neither_with_their_numbers() -> None:
    below = paired(two([0.8, 0.9, 1.0], [1.0, 1.11, 1.19]), "mse", "A", "B")
    assert sentence(below) == (
        "mse of A is below that of B: 0.9 against 1.1, difference -0.2 (95 % interval -0.225 to -0.175 over 3 seeds), "
        "lower on 3 of 3; 3 seeds cannot reach 0.05 in the exact test (smallest p 0.25), so the interval alone speaks"
    )
    above = paired(two([1.0, 1.11, 1.19], [0.8, 0.9, 1.0]), "mse", "A", "B")
    assert sentence(above, "MSE").startswith("MSE of A is above that of B: 1.1 against 0.9, difference +0.2 (95 %")
    neither = sentence(paired(two([0.8, 1.3, 1.2], [1.0, 1.0, 1.0]), "mse", "A", "B"))
    assert (
        neither.startswith("mse of A is not distinguishable from that of B: 1.1 against 1,") and "on 2 of 3" in neither
    )


def test_enough_seeds_have_a_p() -> None:
    text = sentence(paired(normal(6, 3.0), "mse", "A", "B"))
    assert text.startswith("mse of A is above that of B") and "higher on 6 of 6; p = 0.0312 in the exact" in text


def test_one_seed_decides_nothing() -> None:
    pair = paired(two([0.5], [0.25]), "mse", "A", "B")
    assert np.isnan([pair.low, pair.high]).all() and pair.p == 1 and not pair.distinguishable
    assert sentence(pair) == "mse of A against B cannot be decided on one seed: 0.5 against 0.25"


def test_an_interval_of_95_percent_covers_the_truth_19_times_in_20() -> None:
    """So one comparison in twenty is told apart where nothing differs."""
    rng, told = np.random.default_rng(1), []
    for _ in range(200):
        x, y = rng.normal(0, 1, (2, 3))
        told.append(paired(two(x.tolist(), y.tolist()), "mse", "A", "B").distinguishable)
    assert 0.02 < np.mean(told) < 0.09


def test_differences_in_percent_of_the_second() -> None:
    rows = table(A={"mse": [3.0, 5.0], "kl_mean": [1.0, 1.0]}, B={"mse": [-2.0, -2.0], "kl_mean": [0.0, 0.0]})
    pairs = [paired(rows, figure, "A", "B") for figure in ("mse", "kl_mean")]
    found = relative_differences(pairs)
    assert found["figure"].tolist() == ["mse", "kl_mean"] and found[["a", "b"]].to_numpy().tolist() == [["A", "B"]] * 2
    assert found.loc[0, "percent"] == 300 and found.loc[0, "high"] == pytest.approx(50 * pairs[0].high)
    assert found.loc[1, ["percent", "low", "high"]].isna().all() and found["distinguishable"].tolist() == [False, True]
    assert list(relative_differences([])) == ["figure", "a", "b", "percent", "low", "high", "distinguishable"]

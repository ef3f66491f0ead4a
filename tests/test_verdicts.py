import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from workbench.config import ConfigError
from workbench.datasets.frames import DataError
from workbench.verdicts import Verdict, decide_many, decide_pair, read_verdict, report, write_verdict

PARAMETERS = {
    "V1": {"experiment": "e", "run": "V1-0", "seed": 0, "variational": False, "lr": 1e-5},
    "V2": {"experiment": "e", "run": "V2-0", "seed": 0, "variational": True, "lr": np.float32(0.5), "sizes": (1, 2)},
}


def pair_rows(seeds: int = 3, **of_v2: float) -> pd.DataFrame:
    """V1 and V2, equal but for 10 % more parameters of V2 and the figures given; equal on all seeds but for noise."""
    equal = {"mse": 0.01, "path_ratio": 1.5, "ppl": 3.0, "sharpness": 0.9, "parameters": 1000, "seconds": 30.0}
    latent = {"active_units": 10, "latent_size": 64, "kl_mean": 2.0, "kl_share": 0.1}
    rows = []
    for seed in range(seeds):
        rows.append({"setting": "V1", "seed": seed} | equal | latent | {"kl_mean": np.nan, "kl_share": np.nan})
        rows.append({"setting": "V2", "seed": seed} | equal | latent | {"parameters": 1100} | of_v2)
    table = pd.DataFrame(rows)
    return table.assign(ppl=table["ppl"] * (1 + 0.001 * table["seed"]))


def pair(rows: pd.DataFrame, failed: tuple[str, ...] = ()) -> Verdict:
    return decide_pair(rows, "V1", "V2", "layouts/phase1_2", PARAMETERS, failed)


def shapes(**settings: tuple[list[float], int, int]) -> pd.DataFrame:
    """Settings with pixel accuracies by seed, a size of the latent, and parameters."""
    rows = []
    for name, (accuracies, size, parameters) in settings.items():
        rows += [
            {"setting": name, "seed": i, "pixel_accuracy": value, "latent_size": size, "parameters": parameters}
            for i, value in enumerate(accuracies)
        ]
    return pd.DataFrame(rows)


def many(rows: pd.DataFrame, **settings: Any) -> Verdict:
    return decide_many(rows, "layouts/phase1_1", {name: {"name": name} for name in rows["setting"]}, **settings)


# --- two settings ---


def test_without_a_gain_the_simpler_wins() -> None:
    verdict = pair(pair_rows())
    assert (verdict.winner, verdict.rival, verdict.decided, verdict.seeds) == ("V1", "V2", True, [0, 1, 2])
    assert verdict.reason == (
        "V1 wins: of 8 criteria 0 favour V2 (none) and 1 favour V1 (simpler +100); numbers are V2 - V1."
    )
    assert verdict.parameters == {"variational": False, "lr": 1e-5}


def test_a_tie_goes_to_the_simpler_and_one_more_to_the_variational() -> None:
    tie = pair(pair_rows(ppl=2.0))
    assert tie.winner == "V1" and tie.decided
    assert "1 favour V2 (better interpolation -1) and 1 favour V1 (simpler +100), and a tie goes to the d" in tie.reason
    ahead = pair(pair_rows(ppl=2.0, active_units=32))
    assert (ahead.winner, ahead.rival) == ("V2", "V1") and ahead.reason.startswith("V2 wins: of 8 criteria 2 favour V2")
    assert "a tie" not in ahead.reason
    assert ahead.parameters == {"variational": True, "lr": 0.5, "sizes": [1, 2]}
    assert type(ahead.parameters["lr"]) is float


def test_what_seeds_do_not_tell_apart_does_not_count() -> None:
    rows = pair_rows(active_units=32)
    rows.loc[rows["setting"] == "V2", "ppl"] = [1.0, 4.0, 1.0]
    assert pair(rows).winner == "V1"


def test_one_seed_says_which_would_lead() -> None:
    verdict = pair(pair_rows(seeds=1, ppl=2.0, mse=0.009))
    assert (verdict.winner, verdict.decided, verdict.seeds) == ("V2", False, [0])
    assert verdict.reason.startswith("One seed cannot decide; V2 would lead: on this seed, of 8 criteria 2 favour V2")


def test_seeds_of_one_setting_are_left_out_and_named() -> None:
    rows = pair_rows()
    verdict = pair(rows[(rows["setting"] == "V1") | (rows["seed"] != 1)], failed=("V2-1",))
    assert verdict.seeds == [0, 2] and verdict.failed == ["V2-1"]
    assert verdict.reason.endswith("; seeds left out, as not every setting has them: 1.")
    third = rows.assign(setting="V3", seed=rows["seed"] + 10 * (rows["setting"] == "V2"))
    assert "left out" not in pair(pd.concat([rows, third])).reason


def test_parameters_of_all_that_is_compared_are_needed() -> None:
    with pytest.raises(DataError, match="parameters of V2 are absent: must be given for every setting"):
        decide_pair(pair_rows(), "V1", "V2", "e", {"V1": {"a": 1}})


# --- many settings ---


def test_the_smallest_latent_within_the_tolerance_wins() -> None:
    rows = shapes(
        large=([0.99, 0.991], 1024, 10),
        good=([0.982, 0.981], 256, 30),
        lean=([0.983, 0.985], 256, 20),
        poor=([0.9, 0.91], 16, 10),
    )
    verdict = many(rows)
    assert (verdict.winner, verdict.rival, verdict.decided, verdict.seeds) == ("lean", "good", True, [0, 1])
    assert verdict.reason == (
        "lean wins: of the 3 settings (of 4) within 1 % of the best pixel_accuracy it has the smallest latent, 256 "
        "numbers, then the fewest parameters, 20: pixel_accuracy 0.984 against 0.9905 of large (-0.66 %)."
    )
    assert verdict.parameters == {"name": "lean"}
    assert {row.criterion: row.favours for row in verdict.criteria} == {
        "good close to the best": "neither",
        "lean close to the best": "neither",
        "poor close to the best": "large",
    }
    assert verdict.criteria[2].sentence.endswith("-8.6 % of large, beyond the tolerance of 1 %")


def test_the_tolerance_is_the_users_and_all_else_follows_by_its_error() -> None:
    rows = shapes(large=([0.99] * 2, 1024, 10), good=([0.982] * 2, 256, 30), poor=([0.97] * 2, 16, 10))
    strict = many(rows, tolerance=0)
    assert (strict.winner, strict.rival) == ("large", "good") and strict.reason.endswith(
        "pixel_accuracy 0.99, the best."
    )
    assert many(rows, tolerance=0.03).winner == "poor"
    with pytest.raises(DataError, match=r"tolerance=1: must be in \[0, 1\), a share of the best setting's"):
        many(rows, tolerance=1)


def test_of_an_error_less_is_better() -> None:
    rows = shapes(large=([0.1, 0.1], 1024, 10), small=([0.101, 0.1], 64, 10), poor=([0.2, 0.2], 16, 10))
    verdict = many(rows.rename(columns={"pixel_accuracy": "mse"}), error="mse")
    assert (verdict.winner, verdict.rival) == (
        "small",
        "large",
    ) and "mse 0.1005 against 0.1 of large (+0.5 %)" in verdict.reason
    assert [row.leads for row in verdict.criteria] == ["neither", "large"]


def test_noise_does_not_make_a_setting_as_good_but_it_is_named() -> None:
    """Not distinguishable from the best, as one of its seeds failed to learn."""
    rows = shapes(large=([0.99, 0.99, 0.99], 1024, 10), wild=([0.99, 0.985, 0.5], 16, 10), poor=([0.9] * 3, 8, 10))
    verdict = many(rows)
    assert verdict.winner == "large" and "not distinguishable" in verdict.criteria[0].sentence
    assert [(row.favours, row.leads) for row in verdict.criteria] == [("cannot decide", "large"), ("large", "large")]
    assert verdict.reason.endswith("; smaller, and not ruled out by the seeds: wild.")


def test_one_common_seed_does_not_decide_between_many() -> None:
    rows = shapes(large=([0.99, 0.9], 1024, 10), small=([0.985], 64, 10))
    verdict = many(rows)
    assert (verdict.winner, verdict.decided, verdict.seeds) == ("small", False, [0])
    assert verdict.reason.startswith("One seed cannot decide; small would lead: of the 2 settings")
    assert verdict.reason.endswith("; seeds left out, as not every setting has them: 1.")
    assert [row.favours for row in verdict.criteria] == ["cannot decide"]


def test_settings_that_lack_seeds_are_left_out_and_named() -> None:
    """Each run that failed took another seed with it, so that no seed is common to all."""
    rows = shapes(a=([0.99] * 3, 64, 10), b=([0.9] * 3, 32, 10), c=([0.9] * 3, 16, 10), d=([0.9] * 3, 8, 10))
    gone = [("b", 0), ("c", 1), ("d", 2)]
    verdict = many(rows[[pair not in gone for pair in zip(rows["setting"], rows["seed"], strict=True)]])
    assert verdict.winner == "a" and verdict.decided and verdict.seeds == [1, 2]
    assert verdict.reason.endswith(
        "as not every setting has them: 0; settings left out, for want of common seeds: d, c."
    )
    assert [row.criterion for row in verdict.criteria] == ["b close to the best"]


def test_a_setting_without_the_error_is_refused() -> None:
    rows = shapes(rgb=([np.nan, np.nan], 64, 10), both=([0.9, 0.9], 64, 10))
    with pytest.raises(DataError, match="pixel_accuracy: rgb has no such figure: must be in every run; leave these"):
        many(rows)
    with pytest.raises(
        DataError, match="latent_size: rgb has no such figure, both has no such figure: must be in every"
    ):
        many(rows.assign(pixel_accuracy=1.0).drop(columns="latent_size"))
    with pytest.raises(DataError, match="settings both: must be at least two"):
        many(rows[rows["setting"] == "both"])


# --- the file ---


def test_a_verdict_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "verdict.yaml"
    for verdict in (
        pair(pair_rows(ppl=2.0), ("V1-3",)),
        pair(pair_rows(seeds=1)),
        many(shapes(a=([1.0], 1, 1), b=([0.5], 2, 2))),
    ):
        write_verdict(path, verdict)
        assert read_verdict(path) == verdict
    assert [entry.name for entry in tmp_path.iterdir()] == ["verdict.yaml"]


def test_the_file_holds_plain_values_under_the_agreed_keys(tmp_path: Path) -> None:
    path = tmp_path / "verdict.yaml"
    write_verdict(path, pair(pair_rows(ppl=2.0, active_units=32), ("V1-3",)))
    content = yaml.safe_load(path.read_text())
    assert list(content) == [
        *("experiment", "winner", "rival", "decided", "reason", "parameters", "failed", "seeds", "criteria")
    ]
    assert "!!" not in path.read_text() and content["failed"] == ["V1-3"] and content["decided"] is True
    ppl = next(row for row in content["criteria"] if row["figure"] == "ppl")
    assert ppl["favours"] == "V2" and ppl["difference"] == pytest.approx(-1, rel=0.01) and ppl["p"] == 0.25


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"winner": None}, "winner=None in .*: must be text"),
        ({"winner": 4}, "winner=4 in .*verdict.yaml .damaged: run the experiment that writes it again.: must be text"),
        ({"decided": "yes"}, "decided='yes' in .*: must be true or false"),
        ({"parameters": {}}, "parameters={} in .*: must have at least 1 entry"),
        ({"seeds": [0.5]}, "seeds.*0.5 in .*: must be a whole number"),
        ({"looser": "V1"}, "unknown parameter 'looser' in .*verdict.yaml"),
        ({"criteria": [{"criterion": "mse"}]}, "figure=.* in .*: must be given"),
        ({"criteria": "none"}, "holds no verdict .keys and values, with a list of criteria.; run the experiment"),
        ({"criteria": [4]}, "holds no verdict"),
        ({3: 4}, "holds no verdict"),
    ],
)
def test_a_changed_file_is_refused_by_key(tmp_path: Path, changed: dict[Any, Any], message: str) -> None:
    path = tmp_path / "verdict.yaml"
    write_verdict(path, pair(pair_rows()))
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changed))
    with pytest.raises(ConfigError, match=message):
        read_verdict(path)


def test_an_incomplete_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "verdict.yaml"
    with pytest.raises(ConfigError, match="verdict.yaml: no such file; run the experiment that writes it first"):
        read_verdict(path)
    write_verdict(path, pair(pair_rows()))
    text = path.read_text()
    for key in Verdict.model_fields:
        content = yaml.safe_load(text)
        del content[key]
        path.write_text(yaml.safe_dump(content))
        with pytest.raises(ConfigError, match=f"{key}.*must be given|holds no verdict"):
            read_verdict(path)
    for damaged in ("winner: [", "", "4", "!!python/object/apply:os.getcwd []", text[: len(text) // 2] + "\n]"):
        path.write_text(damaged)
        with pytest.raises(ConfigError, match="damaged or not YAML|holds no verdict"):
            read_verdict(path)
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match="damaged or not YAML"):
        read_verdict(path)


def test_a_number_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "verdict.yaml"
    write_verdict(path, pair(pair_rows()))
    path.write_text(re.sub("difference: .*", "difference: .nan", path.read_text(), count=1))
    with pytest.raises(ConfigError, match="difference=nan in .*: must be finite"):
        read_verdict(path)


# --- the report ---


def sections(page: str) -> dict[str, str]:
    parts = re.split(r"^#+ (.*)$", page, flags=re.MULTILINE)
    return dict(zip(parts[1::2], (part.strip() for part in parts[2::2]), strict=True))


def test_the_report_answers_first_and_names_failed_runs_at_the_top() -> None:
    rows = pair_rows(ppl=2.0).assign(loss_spread=0.05, gradient_spikes=[0, 1, 2, 3, 4, 5], run="a|b")
    verdict = pair(rows, ("V1-3", "V2-3"))
    page = report("Variational?", rows, verdict, ["Flats are made."])
    found = sections(page)
    assert list(found) == ["Variational?", "Settings", "Floors", "Criteria", "Stability", "Limits"]
    floors = pd.DataFrame({"floor": ["mean image", "PCA-8"], "mse": [0.5, 0.125]})
    page_of = sections(report("q", rows, verdict, floors=floors))["Floors"]
    assert "| figure | mean image | PCA-8 |" in page_of and "scale] | 0.5 | 0.125 |" in page_of
    top = "**Failed runs, in none of these figures: V1-3, V2-3.**\n\n" + verdict.reason
    assert found["Variational?"] == top and page.endswith("\n")
    assert "Failed" not in report("q", rows, pair(rows))
    assert "| seeds | 3 | 3 |\n| MSE [per element, [-1, 1] scale] | 0.01 | 0.01 |" in found["Settings"]
    assert "| perceptual path length [distance / step²] | 3.003 ± 0.003 | 2.002 ± 0.002 |" in found["Settings"]
    assert "| KL [nats per dimension] | – | 2 |" in found["Settings"] and "a|b" not in page
    assert "spikes of the gradient norm [steps logged] | 2 ± 2 | 3 ± 2 |" in found["Stability"]
    assert "spikes" not in found["Settings"] and "Flats are made." in found["Limits"]


def test_every_criterion_has_its_number_in_the_report() -> None:
    rows = pair_rows(ppl=2.0)
    verdict = pair(rows)
    lines = sections(report("q", rows, verdict))["Criteria"].split("\n")
    assert len(lines) == 2 + len(verdict.criteria)
    assert lines[3] == (
        "| better interpolation | V2 | ppl: V2 2.002 ± 0.002, V1 3.003 ± 0.003; difference -1, -33 % "
        "(95 % interval -1 to -0.999) |"
    )
    assert "p = " not in lines[3], "three seeds cannot reach 0.05"
    assert "| simpler | V1 | parameters: V2 1,100, V1 1,000; difference +100, +10 % |" in lines
    six = pair_rows(seeds=6, ppl=2.0)
    page = report("q", six, pair(six))
    assert ", p = 0.0312 |" in page and "p is at most 0.05" in sections(page)["Limits"]


def test_the_report_says_what_seeds_cannot() -> None:
    rows = pair_rows(ppl=2.0)
    limits = sections(report("q", rows, pair(rows)))["Limits"]
    assert "3 seeds in common (0, 1, 2). 3 seeds cannot reach 0.05 in the exact test (smallest p 0.25)" in limits
    assert "a low perceptual path length too" in limits and "Seconds are comparable only" in limits
    assert "Each of 5 misses the truth" in limits, "two of ten are of V2 alone, one is a count, two are not measured"
    one = rows[rows["seed"] == 0]
    assert sections(report("q", one, pair(one)))["Limits"].startswith(
        "- One common seed: the differences cannot be told"
    )
    assert sections(report("q", one, pair(one)))["Stability"] == "Not measured."

from pathlib import Path

import pytest
import torch
from projects import write_verdict_of

from workbench import sweeps
from workbench.config import ConfigError
from workbench.parameters import Parameter
from workbench.runs import RunError, open_run, run_path, write_json
from workbench.sweeps import Layer, Sweep, check_report, find_sweep, merged, placed, set_aside, slots, spread

GOOD = "notebook: 02_train\nsettings:\n  V1: {lr: 0.5}\n"
NOTEBOOKS = ["01_first", "02_train", "06_report"]
BASE = "base: layouts/phase1_1/report\n"
PARAMETERS = {"run": Parameter(str, "r", ""), "seed": Parameter(int, 4, ""), "n": Parameter(int, 1, "")}


def read(folder: Path, text: str, **asked: object) -> Sweep | None:
    (folder / "settings.yaml").write_text(text)
    (folder / "02_train.yaml").touch()
    return find_sweep(folder, "S", NOTEBOOKS, **asked)


# --- settings.yaml ---


def test_what_a_file_asks_for(tmp_path: Path) -> None:
    assert find_sweep(tmp_path, "S", NOTEBOOKS) is None
    assert read(tmp_path, GOOD) == Sweep("S", "02_train", {"V1": {"lr": 0.5}}, 1, Layer({}))
    assert read(tmp_path, GOOD + "seeds: 3").seeds == 3
    assert read(tmp_path, GOOD + "seeds: 3", seeds=2).seeds == 2


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("", ["S: must name the notebook that is swept, such as `notebook: 02_train_vae`"]),
        (GOOD + "setings: 1", ["unknown key 'setings' in S: did you mean 'settings'?"]),
        (
            GOOD.replace("02_train", "02_trian"),
            ["notebook='02_trian' in S: no notebook of that name; did you mean '02_train'?"],
        ),
        (
            GOOD.replace("02_train", "[a]"),
            ["notebook=['a'] in S: no notebook of that name; must be one of 01_first, 02_train, 06_report"],
        ),
        (
            GOOD.replace("02_train", "06_report"),
            ["notebook='06_report' in S: 06_report.yaml must lie beside it, if only empty"],
        ),
        (GOOD + "  V2: 3", ["setting V2=3 in S: must hold parameters and their values, such as {variational: false}"]),
        (GOOD + "  V2:", ["setting V2=None in S: must hold parameters and their values, such as {variational: false}"]),
        (
            GOOD + "  a/b: {}\n  ..: {}\n  16: {}",
            [
                f"setting {name} in S: must be a folder's name, of letters, digits and . _ + - (a number in quotes)"
                for name in ("'a/b'", "'..'", "16")
            ],
        ),
        (
            GOOD + "  V2: {seed: 1, n: 2, run: a}",
            [
                "run='a' in S, setting V2: the sweep gives it: leave it out",
                "seed=1 in S, setting V2: the sweep gives it: leave it out",
            ],
        ),
        (GOOD + "  V1: {lr: 2.0}", ["V1 in S: is given twice: keep one"]),
        (GOOD + "  V2: {n: 1, lr: 0.5, n: 2}", ["n in S, setting V2: is given twice: keep one"]),
        (GOOD + "seeds: 0", ["seeds=0 in S: must be a whole number, at least 1"]),
        (GOOD + "seeds: true", ["seeds=True in S: must be a whole number, at least 1"]),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path: Path, text: str, problems: list[str]) -> None:
    empty = [] if text else ["settings in S: must hold a line for each setting, such as `V1: {variational: false}`"]
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert str(caught.value).splitlines() == problems + empty


@pytest.mark.parametrize("settings", ["", "settings:", "settings: {}", "settings: [V1]"])
def test_settings_that_are_none(tmp_path: Path, settings: str) -> None:
    rule = "must hold a line for each setting, such as `V1: {variational: false}`"
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, f"notebook: 02_train\n{settings}")
    assert str(caught.value) == f"settings in S: {rule}"


def test_all_problems_of_a_file_and_of_what_was_asked_for_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, BASE + "seed: 3\nnotebook: 3", seeds=0, overrides=["run"])
    whats = [what for what, _ in caught.value.problems]
    assert whats[:3] == ["--seeds 0", "-p run", "unknown key 'seed' in S"]
    assert whats[3:] == ["notebook=3 in S", "settings in S", "base='layouts/phase1_1/report' in S"]


def test_seeds_of_a_folder_without_settings(tmp_path: Path) -> None:
    assert find_sweep(tmp_path, "S", NOTEBOOKS, seeds=2) is None
    with pytest.raises(ConfigError, match="^--seeds 0: must be at least 1$"):
        find_sweep(tmp_path, "S", NOTEBOOKS, seeds=0)


# --- the base ---


@pytest.mark.parametrize("base", ["report", "../secret/report", "/etc/report", "3", "[a/b]", ""])
def test_a_base_that_is_no_report(tmp_path: Path, base: str) -> None:
    rule = "must be the experiment and run of a report, such as layouts/phase1_1/report"
    with pytest.raises(ConfigError, match=f"^base=.* in S: {rule}$"):
        read(tmp_path, f"base: {base}\n{GOOD}")


def test_a_base_gives_the_parameters_of_its_verdict(tmp_path: Path) -> None:
    path = write_verdict_of("layouts/phase1_1", {"n": 3, "dims": [1, 2]})
    assert read(tmp_path, BASE + GOOD).base == Layer({"n": 3, "dims": [1, 2]}, f" in {path}")


def test_a_base_without_a_verdict_says_what_to_run(tmp_path: Path) -> None:
    rule = "no verdict there yet: run params/layouts/phase1_1 first"
    with pytest.raises(ConfigError, match=f"^base='layouts/phase1_1/report' in S: {rule} .*/verdict.yaml"):
        read(tmp_path, BASE + GOOD)


@pytest.mark.parametrize("damage", ["{", "a: b", "- 1", "\x00"])
def test_a_damaged_verdict_is_named(tmp_path: Path, damage: str) -> None:
    path = write_verdict_of("layouts/phase1_1", {"n": 3})
    path.write_text(damage)
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, BASE + GOOD)
    assert str(path) in str(caught.value) and "run the experiment that writes it again" in str(caught.value)


def test_failed_runs_of_a_base_have_to_be_accepted(tmp_path: Path) -> None:
    write_verdict_of("layouts/phase1_1", {"n": 3}, ["c16_s4-0", "c8_s3-2"])
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, BASE + GOOD)
    rule = "run params/layouts/phase1_1 again, or go on without with --accept-failures"
    assert str(caught.value) == f"base='layouts/phase1_1/report' in S: c16_s4-0, c8_s3-2 failed there: {rule}"
    assert read(tmp_path, BASE + GOOD, accept=["failures"]).base.values == {"n": 3}


def test_a_base_on_one_seed_has_to_be_accepted(tmp_path: Path) -> None:
    write_verdict_of("layouts/phase1_1", {"n": 3}, decided=False)
    rule = "one seed decided nothing there: run params/layouts/phase1_1 --seeds 3, or begin from .*, which led, with "
    with pytest.raises(ConfigError, match=f"base='layouts/phase1_1/report' in S: {rule}--accept-undecided"):
        read(tmp_path, BASE + GOOD)
    assert read(tmp_path, BASE + GOOD, accept=["undecided"]).base.values == {"n": 3}


def test_what_the_settings_vary_cannot_be_given_for_all(tmp_path: Path) -> None:
    text = GOOD + "  V2: {lr: 0.1}\n  V3: {lr: 0.1, n: 2}\n"
    assert len(read(tmp_path, text, overrides=["n"]).settings) == 3
    with pytest.raises(ConfigError, match="-p m -p lr: makes settings V1 and V2 of S the same: leave out what they v"):
        read(tmp_path, text, overrides=["m", "lr"])
    with pytest.raises(ConfigError, match="^-p m --grid lr: makes settings V1 and V2 of S the same: "):
        read(tmp_path, text, overrides=["m"], varied=["lr"])


# --- the runs ---


def test_later_layers_override_and_an_error_names_the_last_that_has_the_parameter() -> None:
    layers = [Layer({"a": 1, "b": 1}, " in A"), Layer({"b": 2}, ", for B", "-p ")]
    assert merged(layers) == {"a": 1, "b": 2}
    expected = {"a=1": "a=1 in A", "b=2": "-p b=2, for B", "b[0]='x'": "-p b[0]='x', for B", "c=0": "c=0 in A"}
    expected |= {"unknown parameter 'b'": "-p unknown parameter 'b', for B", "a + b = 3": "a + b = 3 in A"}
    assert {what: placed((what, "rule"), layers, layers[0]) for what in expected} == {
        what: (told, "rule") for what, told in expected.items()
    }


@pytest.mark.parametrize(
    ("own", "typed", "first"), [({}, {}, 4), ({"seed": 7}, {}, 7), ({"seed": 7}, {"seed": 20}, 20)]
)
def test_all_settings_of_a_seed_come_before_the_next_seed(own: dict, typed: dict, first: int) -> None:
    sweep = Sweep("S", "02_train", {"V1": {"n": 1}, "V2": {"n": 2}}, 2, Layer({"n": 0, "seed": 99}))
    runs = [merged(layers) | fixed for layers, fixed in spread(sweep, PARAMETERS, Layer(own), Layer(typed))]
    assert runs == [{"n": n, "run": f"V{n}-{seed}", "seed": seed} for seed in (first, first + 1) for n in (1, 2)]


def test_what_cannot_be_swept() -> None:
    sweep = Sweep("S", "02_train", {"V1": {}}, 1, Layer({}))
    with pytest.raises(ConfigError, match="^run='vae' in F: the sweep gives it: leave it out$"):
        list(spread(sweep, PARAMETERS, Layer({"run": "vae"}, " in F"), Layer({})))
    rule = "declares no parameter seed, and so cannot be swept"
    with pytest.raises(ConfigError, match=f"^notebook='02_train' in S: {rule}$"):
        list(spread(sweep, {"run": PARAMETERS["run"]}, Layer({}), Layer({})))


@pytest.mark.parametrize(
    ("present", "jobs", "devices", "visible", "expected"),
    [
        (3, None, ["auto"] * 5, None, ["0", "1", "2"]),
        (3, None, ["auto"] * 2, None, ["0", "1"]),
        (2, 4, ["cuda"] * 5, None, ["0", "1", "0", "1"]),
        (2, None, ["cuda:0"] * 5, "5,GPU-b", ["5", "GPU-b"]),
    ],
)
def test_each_run_gets_a_device_of_its_own(
    present: int, jobs: int | None, devices: list, visible: str | None, expected: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: present)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert slots(jobs, devices) == [{"CUDA_VISIBLE_DEVICES": name} for name in expected]


@pytest.mark.parametrize(
    ("present", "jobs", "device", "set_by_user", "expected"),
    [
        (0, None, "auto", None, [{}]),
        (0, 3, "auto", None, [{"OMP_NUM_THREADS": "2"}] * 3),
        (0, 8, "auto", None, [{"OMP_NUM_THREADS": "1"}] * 5),
        (0, 3, "auto", "4", [{}] * 3),
        (2, None, "cpu", None, [{}]),
        (2, 2, "cpu", None, [{"OMP_NUM_THREADS": "3"}] * 2),
    ],
)
def test_runs_on_the_cpu_share_its_cores(
    present: int,
    jobs: int | None,
    device: str,
    set_by_user: str | None,
    expected: list,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: present)
    monkeypatch.setattr(sweeps, "usable_cores", lambda: 7)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if set_by_user:
        monkeypatch.setenv("OMP_NUM_THREADS", set_by_user)
    assert slots(jobs, [device] * 5) == expected


def test_jobs_and_devices_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="^--jobs 0: must be at least 1$"):
        slots(0, ["auto"])
    rule = "each run of a sweep sees one device: write 'auto', and choose devices with CUDA_VISIBLE_DEVICES"
    with pytest.raises(ConfigError, match=f"^device='cuda:1': {rule}$"):
        slots(None, ["cuda:1", "auto", "cuda:1"])


# --- reports on them ---


def report(runs: list[str], finished: str = "", **others: object) -> dict:
    """A report that was begun, or was finished at that time, and its parameters."""
    parameters = {"experiment": "demo", "run": "report", "runs": runs} | others
    run = open_run(parameters)
    (run.path / "metrics.csv").touch()
    if finished:
        write_json(run.path / "summary.json", {"finished": finished})
    return parameters


def finish(run: str, when: str) -> None:
    write_json(open_run({"experiment": "demo", "run": run}).path / "summary.json", {"finished": when})


def test_a_report_stays_while_its_runs_are_as_they_were(tmp_path: Path) -> None:
    absent = {"experiment": "demo", "run": "report", "runs": ["V1-0"]}
    assert set_aside(absent) is None
    finish("V1-0", "2025-01-01T10:00:00")
    parameters = report(["V1-0", "V1-1"], "2025-01-01T11:00:00")
    assert set_aside(parameters) is None and run_path(parameters).exists()


def test_a_report_is_set_aside_once_a_failed_run_has_finished_after_all() -> None:
    parameters = report(["V1-0", "V1-1"], "2025-01-01T11:00:00")
    finish("V1-1", "2025-01-01T12:00:00")
    folder = run_path(parameters)
    assert set_aside(parameters) == folder.with_name("report.1")
    assert not folder.exists() and (folder.with_name("report.1") / "summary.json").exists()
    report(["V1-0", "V1-1"], "2025-01-01T11:30:00")
    assert set_aside(parameters) == folder.with_name("report.2"), "the first one was overwritten"


@pytest.mark.parametrize("finished", ["", "2025-01-01T11:00:00"])
def test_a_report_on_other_runs_is_no_obstacle_and_one_of_other_settings_is(finished: str) -> None:
    more = report(["V1-0"], finished) | {"runs": ["V1-0", "V1-1"]}
    check_report(more)
    with pytest.raises(RunError, match="holds a run of another configuration:\n  split: absent there, test here\n"):
        check_report(more | {"split": "test"})
    assert set_aside(more) == run_path(more).with_name("report.1")


def test_a_report_that_stopped_before_it_had_anything_is_begun_again_where_it_is() -> None:
    parameters = {"experiment": "demo", "run": "report", "runs": ["V1-0"]}
    run = open_run(parameters)
    finish("V1-0", "2999-01-01T10:00:00")
    assert set_aside(parameters | {"runs": ["V1-0", "V1-1"]}) is None
    run.record(weights={"V1-1": "ab"})
    assert set_aside(parameters) == run.path.with_name("report.1"), "other weights would be refused"

import shutil
from pathlib import Path

import pytest
from projects import (
    PARAMETERS,
    SEED,
    make_project,
    make_sweep,
    write_notebook,
    write_params,
    write_verdict_of,
)

from workbench.config import ConfigError
from workbench.runs import RunError, open_run
from workbench.tasks import Task, plan, plan_points

ROOT = Path(__file__).parents[1]
SHIPPED = ["layouts/phase1_1", "layouts/phase1_2", "layouts/phase1_3"]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_project(tmp_path, monkeypatch)


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The parameter folder of a sweep."""
    return make_sweep(tmp_path, monkeypatch) / "params" / "demo"


# --- folders without a sweep ---


def test_the_plan_holds_every_notebook_in_order_with_its_parameters(project: Path) -> None:
    first, second = plan(project / "params" / "demo", {})
    assert [first.notebook.stem, second.notebook.stem] == ["01_first", "02_second"]
    assert first.given == {"experiment": "demo", "run": "one", "n": 5}
    assert first.resolved == {"experiment": "demo", "run": "one", "n": 5, "lr": 0.1, "dims": [1]}


def test_a_folder_of_folders_names_the_experiment(project: Path) -> None:
    (project / "params" / "layouts").mkdir()
    (project / "params" / "demo").rename(project / "params" / "layouts" / "phase1_1")
    assert plan(project / "params" / "layouts" / "phase1_1", {})[0].resolved["experiment"] == "layouts/phase1_1"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"n": "7"}, {"n": 7}),
        ({"lr": "1e-4"}, {"lr": 1e-4}),
        ({"lr": "2"}, {"lr": 2.0}),
        ({"dims": "[3, 4]"}, {"dims": [3, 4]}),
        ({"run": "5"}, {"run": "5"}),
        ({"run": "a=b"}, {"run": "a=b"}),
    ],
)
def test_overrides_go_to_every_notebook_that_knows_them(project: Path, overrides: dict, expected: dict) -> None:
    for task in plan(project / "params" / "demo", overrides):
        assert {key: task.resolved[key] for key in expected} == expected
        assert {key: task.given[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"lrr": "1"}, "unknown parameter 'lrr': did you mean 'lr'?"),
        ({"n": "many"}, "-p n='many', for params/demo/{file}.yaml: must be a whole number"),
        ({"n": "1.5"}, "-p n=1.5, for params/demo/{file}.yaml: must be a whole number"),
        ({"lr": "true"}, "-p lr='true', for params/demo/{file}.yaml: must be a number"),
        ({"dims": "[1, 2"}, "-p dims='[1, 2', for params/demo/{file}.yaml: must be a list, such as [32, 64, 128]"),
    ],
)
def test_a_wrong_override_is_named(project: Path, overrides: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(project / "params" / "demo", overrides)
    files = ["01_first", "02_second"] if "{file}" in message else [""]
    assert str(caught.value).splitlines() == [message.format(file=file) for file in files]


def test_a_notebook_is_suggested(project: Path) -> None:
    (project / "params" / "demo" / "02_secnod.yaml").touch()
    with pytest.raises(ConfigError, match="02_secnod.yaml: no notebook of that name; did you mean '02_second'?"):
        plan(project / "params" / "demo", {})


def test_a_folder_outside_of_any_project(project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "01_first.yaml").touch()
    with pytest.raises(ConfigError, match=f"{elsewhere}: lies in no project, .*: move it into params/"):
        plan(elsewhere, {})


def test_no_such_folder_and_an_empty_one(project: Path) -> None:
    with pytest.raises(ConfigError, match="params/dmo: no such folder of parameter files"):
        plan(Path("params/dmo"), {})
    (project / "params" / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"params/empty: holds no parameter files \(<notebook>.yaml\)"):
        plan(Path("params/empty"), {})


# --- sweeps ---


def swept(tasks: list[Task]) -> list[Task]:
    return [task for task in tasks if task.kind == "swept"]


def test_a_sweep_is_run_between_the_notebooks_before_and_after_it(sweep: Path) -> None:
    tasks = plan(sweep, {}, seeds=2)
    names = ["01_first", "V1-0", "V2-0", "V1-1", "V2-1", "06_report"]
    assert [task.name for task in tasks] == names
    assert [task.kind for task in tasks] == ["plain"] + ["swept"] * 4 + ["report"]
    last = {"experiment": "demo", "run": "V2-1", "seed": 1, "n": 5, "lr": 2.0, "dims": [3], "device": "auto"}
    assert tasks[4].resolved == last and tasks[4].notebook.stem == "02_train"
    assert tasks[5].resolved == {"experiment": "demo", "run": "report", "n": 1, "runs": names[1:5]}


def test_each_layer_overrides_those_below_it(sweep: Path) -> None:
    write_verdict_of("layouts/one", {"n": 2, "lr": 0.25, "dims": [2, 2], "device": "cpu"})
    text = "base: layouts/one/report\nnotebook: 02_train\nsettings: {V1: {lr: 0.5}, V2: {}}\n"
    write_params(sweep.parents[1], settings=text, **{"02_train": "n: 5\nlr: 1.0"})
    runs = [task.resolved for task in swept(plan(sweep, {}))]
    assert [(run["n"], run["lr"], run["dims"], run["device"]) for run in runs] == [
        (5, 0.5, [2, 2], "cpu"),
        (5, 1.0, [2, 2], "cpu"),
    ]
    runs = [task.resolved for task in swept(plan(sweep, {"lr": "9", "device": "auto", "seed": "7", "experiment": "x"}))]
    assert [run["lr"] for run in runs] == [9.0, 9.0] and {run["device"] for run in runs} == {"auto"}
    assert [(run["experiment"], run["run"], run["seed"]) for run in runs] == [("x", "V1-7", 7), ("x", "V2-7", 7)]


def test_a_report_may_name_its_runs_itself(sweep: Path) -> None:
    write_params(sweep.parents[1], **{"06_report": "run: report\nruns: [V1-0]"})
    report = plan(sweep, {})[-1]
    assert (report.resolved["runs"], report.kind) == (["V1-0"], "plain")
    assert plan(sweep, {"runs": "[a, b]"})[-1].resolved["runs"] == ["a", "b"]


def test_a_report_is_no_obstacle_to_further_seeds(sweep: Path) -> None:
    begun = open_run(plan(sweep, {})[-1].resolved)
    (begun.path / "metrics.csv").touch()
    assert plan(sweep, {}, seeds=2)[-1].resolved["runs"] == ["V1-0", "V2-0", "V1-1", "V2-1"]
    with pytest.raises(RunError, match="report holds a run of another configuration:\n  n: 1 there, 2 here\n"):
        plan(sweep, {"n": "2"}, seeds=2)


def test_every_problem_is_told_once_with_its_place(sweep: Path) -> None:
    verdict = write_verdict_of("layouts/one", {"m": 2, "dims": ["a"]})
    text = "base: layouts/one/report\nnotebook: 02_train\nsettings:\n  V1: {lrr: 0.5}\n  V2: {lr: 1e-4, n: 1}\n"
    write_params(sweep.parents[1], settings=text, **{"02_train": "seed: x\nn: many", "06_report": "runs: 3"})
    with pytest.raises(ConfigError) as caught:
        plan(sweep, {"device": "3", "n": "few", "q": "1"}, seeds=2)
    number = "must be a number, and YAML reads 1e-4 as text: write 1.0e-4 or 0.0001 without quotes"
    known = "experiment, run, n, lr, dims, seed, device"
    assert sorted(str(caught.value).splitlines()) == sorted(
        [
            "-p n='few', for params/demo/01_first.yaml: must be a whole number",
            "-p n='few', for params/demo/02_train.yaml: must be a whole number",
            "-p n='few', for params/demo/06_report.yaml: must be a whole number",
            f"lr='1e-4' in params/demo/settings.yaml, setting V2: {number}",
            "unknown parameter 'lrr' in params/demo/settings.yaml, setting V1: did you mean 'lr'?",
            f"unknown parameter 'm' in {verdict}: must be one of {known}",
            f"dims[0]='a' in {verdict}: must be a whole number",
            "seed='x' in params/demo/02_train.yaml: must be a whole number",
            "runs=3 in params/demo/06_report.yaml: must be a list, such as [32, 64, 128]",
            f"unknown parameter 'q': must be one of {known}, runs",
        ]
    )


def test_a_broken_settings_file_hides_no_problem_of_the_others(sweep: Path) -> None:
    write_params(sweep.parents[1], settings="{", **{"01_first": "m: 1"})
    with pytest.raises(ConfigError) as caught:
        plan(sweep, {})
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{sweep}/settings.yaml: is not YAML")
    assert second.startswith("unknown parameter 'm' in params/demo/01_first.yaml")


# --- points ---


def test_the_points_of_a_grid_are_experiments_beside_each_other(project: Path) -> None:
    points = plan_points([project / "params" / "demo"], {"lr": "0.5"}, grid=["n=1,2", "dims=[3],[4, 5]"])
    assert [(point.name, point.experiment, point.root) for point in points] == [
        (f"demo/n={n},dims={dims}", "demo", project) for n in (1, 2) for dims in ("3", "4-5")
    ]
    last = points[-1].tasks[1]
    assert last.name == "n=2,dims=4-5/02_second"
    assert last.given == {"experiment": points[-1].name, "run": "two", "lr": 0.5, "n": 2, "dims": [4, 5]}
    (whole,) = plan_points([project / "params" / "demo"], {})
    assert (whole.name, whole.experiment) == ("demo", "demo") and whole.tasks == plan(project / "params" / "demo", {})


def test_seeds_of_a_folder_are_points_too(project: Path) -> None:
    write_notebook(project, "01_first", "print(n)", parameters=PARAMETERS + SEED)
    folder = project / "params" / "demo"
    for overrides, first in (({}, 0), ({"seed": "5"}, 5)):
        points = plan_points([folder], overrides, seeds=2, grid=["n=7"])
        assert [point.name for point in points] == [f"demo/n=7,seed={first}", f"demo/n=7,seed={first + 1}"]
        assert [point.tasks[0].resolved["seed"] for point in points] == [first, first + 1]
        assert "seed" not in points[0].tasks[1].resolved, "given to a notebook that has none"
    write_params(project, **{"01_first": "run: one\nseed: 3"})
    assert [point.name for point in plan_points([folder], {}, seeds=1)] == ["demo/seed=3"]
    write_notebook(project, "02_second", "print(n)", parameters=PARAMETERS + SEED)
    given = r"begin with different seeds \(3 in 01_first.yaml, 0 in 02_second.yaml\): give -p seed=0"
    with pytest.raises(ConfigError, match=f"^--seeds 2: the notebooks of {folder} {given}$"):
        plan_points([folder], {}, seeds=2)


def test_a_grid_repeats_a_whole_sweep(sweep: Path) -> None:
    points = plan_points([sweep], {}, seeds=2, grid=["n=7,8"])
    assert [point.name for point in points] == ["demo/n=7", "demo/n=8"]
    names = ["01_first", "V1-0", "V2-0", "V1-1", "V2-1", "06_report"]
    assert [task.name for task in points[1].tasks] == [f"n=8/{name}" for name in names]
    assert {task.resolved["n"] for task in points[1].tasks} == {8}
    assert points[1].tasks[-1].resolved["runs"] == names[1:5]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"grid": ["nn=1,2"]}, "unknown parameter 'nn' in --grid: did you mean 'n'?"),
        ({"grid": ["lr=1,1.0"]}, "--grid for {folder}: gives the point lr=1.0 twice: leave one out"),
        ({"grid": ["dims=1"]}, "--grid dims=1, for params/demo/{file}.yaml: must be a list, such as [32, 64, 128]"),
        ({"grid": ["n=1"], "overrides": {"n": "2"}}, "--grid n: is given with -p too: leave one out"),
        ({"seeds": 2}, "--seeds 2: no notebook of {folder} declares a parameter seed"),
        ({"seeds": 0}, "--seeds 0: must be at least 1"),
        ({"seeds": 2, "grid": ["seed=1,2"]}, "--grid seed: seeds of {folder} are given by --seeds: leave it out"),
    ],
)
def test_what_is_no_point(project: Path, asked: dict, message: str) -> None:
    folder = project / "params" / "demo"
    with pytest.raises(ConfigError) as caught:
        plan_points([folder], asked.pop("overrides", {}), **asked)
    files = ["01_first", "02_second"] if "{file}" in message else [""]
    assert str(caught.value).splitlines() == [message.format(file=file, folder=folder) for file in files]


def test_a_grid_that_undoes_the_settings_of_a_sweep(sweep: Path) -> None:
    write_params(sweep.parents[1], settings="notebook: 02_train\nsettings: {V1: {lr: 0.5}, V2: {lr: 2.0}}")
    with pytest.raises(ConfigError, match="^--grid lr: makes settings V1 and V2 of params/demo/settings.yaml the same"):
        plan_points([sweep], {}, grid=["lr=1"])
    with pytest.raises(ConfigError, match=f"^--grid seed: seeds of {sweep} are given by --seeds: leave it out$"):
        plan_points([sweep], {}, grid=["seed=1"])


def test_folders_that_would_write_the_same_runs(project: Path) -> None:
    folder = project / "params" / "demo"
    rule = "is asked for twice: name each folder once, in an experiment of its own"
    with pytest.raises(ConfigError) as caught:
        plan_points([folder, folder], {})
    assert sorted(str(caught.value).splitlines()) == [f"demo/one: {rule}", f"demo/two: {rule}"]


def test_notebooks_that_would_write_the_same_run(project: Path) -> None:
    rule = "^demo/again: is the run of both 01_first and 02_second: name each in its file; -p experiment=… is for all"
    with pytest.raises(ConfigError, match=rule):
        plan_points([project / "params" / "demo"], {"run": "again"})


def test_all_problems_of_all_folders_and_points_are_told_at_once(project: Path) -> None:
    folder = project / "params" / "demo"
    with pytest.raises(ConfigError) as caught:
        plan_points([folder, project / "params" / "none"], {"lr": "x"}, grid=["n=1,y"])
    lines = [
        f"{by}, for params/demo/{file}.yaml: {rule}"
        for file in ("01_first", "02_second")
        for by, rule in (("-p lr='x'", "must be a number"), ("--grid n='y'", "must be a whole number"))
    ]
    lines.append(f"{project}/params/none: no such folder of parameter files")
    assert sorted(str(caught.value).splitlines()) == sorted(lines)


# --- what is shipped ---


@pytest.fixture
def phases(tmp_path: Path) -> Path:
    """The project's parameter folders, in a copy whose outputs are the test's own."""
    for folder in ("params", "notebooks"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    return tmp_path / "params"


def test_the_phases_follow_each_other(phases: Path) -> None:
    """Each takes what the winner of the one before was, here the last setting."""
    found = {}
    for name in SHIPPED:
        data = {"data": "mine"} if name == SHIPPED[0] else {}
        found[name] = [task.resolved for task in swept(plan(phases / name, data, seeds=3))]
        winner = {key: value for key, value in found[name][-1].items() if key not in ("experiment", "run", "seed")}
        write_verdict_of(name, winner)
    shapes = [(run["latent_channels"], run["downsampling_steps"]) for run in found[SHIPPED[0]]]
    issue = [(16, 4), (8, 3), (4, 3), (8, 4), (16, 5), (32, 4), (4, 4), (8, 5), (16, 3), (2, 3), (8, 6), (4, 2)]
    assert shapes == issue * 3
    assert {(run["base_channels"], run["image_size"]) for run in found[SHIPPED[0]]} == {(32, 256)}
    assert [(run["variational"], run["kl_weight"]) for run in found[SHIPPED[1]]] == [(False, 0.0), (True, 1e-4)] * 3
    heads = [(run["variational"], run["segmentation"], run["classification"]) for run in found[SHIPPED[2]]]
    losses = [(False, False), (True, False), (True, True)]
    assert heads == [(variational, *loss) for variational in (False, True) for loss in losses] * 3
    for name in SHIPPED:
        assert {(run["epochs"], run["batch_size"], run["data_kind"]) for run in found[name]} == {(10, 16, "layouts")}
    for run in found[SHIPPED[1]] + found[SHIPPED[2]]:
        assert (run["latent_channels"], run["downsampling_steps"], run["data"]) == (4, 2, "mine")


def test_the_demonstration_has_three_seeds(phases: Path) -> None:
    tasks = plan(phases / "demo-layouts", {})
    assert [task.name for task in swept(tasks)] == ["V1-0", "V2-0", "V1-1", "V2-1", "V1-2", "V2-2"]
    assert {(t.resolved["image_size"], t.resolved["downsampling_steps"]) for t in swept(tasks)} == {(64, 2)}

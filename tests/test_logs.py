import csv
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from workbench.logs import Log, peak_memory_mb


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as handle:
        return list(csv.DictReader(handle))


def write(folder: Path, first: int, last: int, scale: float = 1.0) -> None:
    with Log(folder, first - 1) as log:
        for step in range(first, last + 1):
            log.row(step, 1, "train", {"mse": scale / step, "lr": 0.1})


def test_rows_hold_step_epoch_split_and_figures(tmp_path: Path) -> None:
    with Log(tmp_path, 0) as log:
        log.row(5, 1, "train", {"mse": 0.5, "lr": 0.1})
        log.row(5, 1, "val", {"mse": 0.25})
    first, second = rows(tmp_path)
    memory = first.pop("memory_mb"), second.pop("memory_mb")
    assert first == {"step": "5", "epoch": "1", "split": "train", "mse": "0.5", "lr": "0.1"}
    assert second == {"step": "5", "epoch": "1", "split": "val", "mse": "0.25", "lr": ""}
    assert all(float(value) == pytest.approx(peak_memory_mb(), rel=0.5) for value in memory)


def test_memory_is_in_megabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setattr("torch.cuda.is_initialized", lambda: False)  # as it is after tests on a GPU
    resident = psutil.Process().memory_info().rss / 1e6
    assert 0.9 * resident <= peak_memory_mb() < 20 * resident


def test_rows_after_the_step_resumed_from_are_cut(tmp_path: Path) -> None:
    write(tmp_path, 1, 6)
    write(tmp_path, 4, 8, scale=2.0)
    assert [(row["step"], float(row["mse"])) for row in rows(tmp_path)] == [
        (str(step), (1.0 if step < 4 else 2.0) / step) for step in range(1, 9)
    ]


@pytest.mark.parametrize("torn", ["7,1,tra", "7", "7,1,train,0.1", "7,1,train,0.14,0.1,3", "\n\n"])
def test_a_line_torn_by_a_kill_is_cut(torn: str, tmp_path: Path) -> None:
    write(tmp_path, 1, 6)
    with (tmp_path / "metrics.csv").open("a") as handle:
        handle.write(torn)
    write(tmp_path, 7, 8)
    assert [row["step"] for row in rows(tmp_path)] == [str(step) for step in range(1, 9)]
    assert all(None not in row.values() and None not in row for row in rows(tmp_path))


@pytest.mark.parametrize("content", ["", "step,epo", "step,epoch,split,mse,lr,memory_mb\r\n"])
def test_a_start_without_a_whole_row_writes_its_header_again(content: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(content)
    write(tmp_path, 1, 2)
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2"]


def test_starting_anew_drops_every_row(tmp_path: Path) -> None:
    write(tmp_path, 1, 6)
    write(tmp_path, 1, 2, scale=3.0)
    assert [float(row["mse"]) for row in rows(tmp_path)] == [3.0, 1.5]


@pytest.mark.parametrize("first", [1, 4])
def test_tensorboard_shows_each_step_once_after_a_restart(first: int, tmp_path: Path) -> None:
    write(tmp_path, 1, 6)
    write(tmp_path, first, 8, scale=2.0)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("train/mse [per element, squared scale of x]")
    assert [event.step for event in scalars] == list(range(1, 9))
    expected = [(1.0 if step < first else 2.0) / step for step in range(1, 9)]
    assert [event.value for event in scalars] == pytest.approx(expected)


def test_units_stand_beside_the_names(tmp_path: Path) -> None:
    with Log(tmp_path, 0) as log:
        log.row(1, 1, "val", {"mse": 0.5, "kl": 2.0, "loss": 1.0, "other": 3.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "val/mse [per element, squared scale of x]",
        "val/kl [nats]",
        "val/loss [weighted sum of the terms]",
        "val/other",
        "val/memory_mb",
    }


def test_pictures_are_kept_by_step(tmp_path: Path) -> None:
    figure = Figure()
    figure.subplots().plot([0, 1])
    with Log(tmp_path, 0) as log:
        log.picture(50, figure)
    assert (tmp_path / "samples" / "step_0000050.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Images("reconstructions")] == [50]

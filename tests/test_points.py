import pytest

from workbench.config import ConfigError
from workbench.points import WIDTH, grid_points, parse_grid, point_name


def test_commas_inside_brackets_separate_nothing() -> None:
    grid = parse_grid(["lr=0.1,1e-4", "dims=[1, 2],[3]", "data=a=b"])
    assert grid == {"lr": ["0.1", "1e-4"], "dims": ["[1, 2]", "[3]"], "data": ["a=b"]}


def test_every_combination_is_a_point_the_last_parameter_fastest() -> None:
    points = grid_points({"lr": ["1", "2"], "n": ["3", "4"]})
    assert points == [{"lr": lr, "n": n} for lr in "12" for n in "34"]
    assert grid_points({}) == [{}]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["lr"], "--grid lr: must read key=a,b,c"),
        (["lr="], "--grid lr=: must read key=a,b,c"),
        (["=1"], "--grid =1: must read key=a,b,c"),
        (["run=a,b"], "--grid run=a,b: run names folders, and each point has a folder of its own: leave it out"),
        (["lr=1", "lr=2"], "--grid lr=2: lr is given twice: write all its values behind one --grid"),
    ],
)
def test_what_is_no_grid(texts: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_grid(texts)
    assert str(caught.value) == message


def test_the_name_of_a_point_is_a_folders_and_the_same_however_its_values_were_written() -> None:
    values = {"lr": 1e-4, "dims": [3, 4], "align": True, "seed": 2, "name": "a_b-c.d"}
    assert point_name(values) == "lr=0.0001,dims=3-4,align=true,seed=2,name=a_b-c.d"
    assert point_name({"lr": float("1e-4")}) == point_name({"lr": float("0.0001")})


def test_names_that_no_folder_should_have_stay_apart() -> None:
    names = [point_name({"data": data}) for data in ("/a/b", "/a-b", "a b", "", "..", "x" * 200, "x" * 201)]
    assert len(set(names)) == len(names)
    for name in names:
        assert "/" not in name and " " not in name and len(name) <= WIDTH + 7

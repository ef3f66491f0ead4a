from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from explored import Space, open_space

from workbench.colouring import colour_points
from workbench.comparison import decode
from workbench.explorer_figure import explorer_figure
from workbench.paired_exploration import PairedExploration
from workbench.spaces import State

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def space(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Space:
    return open_space("clips", tmp_path_factory.mktemp("clips"))


def draw(explored, state: State, values: np.ndarray):
    colouring = colour_points(values, "column")
    return explorer_figure(explored, state, explored.view(state), explored.route(state), colouring)


def test_it_holds_the_map_with_a_and_b_and_pictures_of_the_path(space: Space) -> None:
    state = State(mode="path", pin_a=2, pin_b=5)
    upper, *lower = draw(space.explore(), state, np.arange(10)).axes
    assert [text.get_text() for text in upper.texts] == ["A", "B"] and len(upper.collections[0].get_offsets()) == 10
    assert [ax.get_title() for ax in lower] == [f"{i / 8:g}" for i in range(9)]
    mu = space.posterior.mu
    middle = space.data.pixels(decode(space.model, torch.lerp(mu[2], mu[5], 0.5)[None])[0])
    np.testing.assert_allclose(lower[4].images[0].get_array().astype(int), middle, atol=1)
    assert len(upper.lines) == 1 and len(upper.lines[0].get_xdata()) == 33


def test_without_a_path_it_holds_what_is_shown(space: Space) -> None:
    state, explored = State(mode="hover", hover=3), space.explore()
    upper, *lower = draw(explored, state, np.arange(10)).axes
    panels = explored.view(state).panels
    assert len(upper.texts) == 0 and len(lower) == len(panels) == 2
    for ax, panel in zip(lower, panels, strict=True):
        title, caption = ax.get_title().split("\n", 1)
        assert (title, caption.replace("\n", " ")) == (panel.title, panel.caption)
        np.testing.assert_array_equal(ax.images[0].get_array(), panel.pixels)


def test_beside_a_walk_what_is_chosen_stands_below(space: Space) -> None:
    explored = space.explore()
    state = State(mode="sliders", pin_a=2, pin_b=5, values=(1.0, -1.0, 0.5))
    upper, *lower = draw(explored, state, np.arange(10)).axes
    assert len(upper.lines[0].get_xdata()) == 33, "the walk is on the map"
    np.testing.assert_array_equal(lower[0].images[0].get_array(), explored.view(state).panels[0].pixels)
    assert len(lower) == 2


@pytest.mark.parametrize("state", [State(), State(mode="path", pin_a=2, pin_b=5)])
def test_layers_are_marked_beside_the_first_picture(space: Space, state: State) -> None:
    explored = space.explore()
    entries = [["first", 0, 0.5], ["small", 0.5, 0.51], ["last", 0.51, 1.0]]
    view = replace(explored.view(state), key={"kind": "layers", "label": "layers of it", "entries": entries})
    colouring = colour_points(np.arange(10), "c")
    _, first, second, *_ = explorer_figure(explored, state, view, explored.route(state), colouring).axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["first", "last"], "what has no room has no name"
    np.testing.assert_allclose(first.get_yticks(), 8 * np.array([0.25, 0.755]) - 0.5)
    np.testing.assert_allclose(first.get_yticks(minor=True), 8 * np.array([0, 0.5, 0.51]) - 0.5)
    assert first.get_xlabel() == "layers of it" and first.axison and not second.axison


def test_an_undefined_path_is_none(space: Space) -> None:
    state, explored = State(pin_a=1, pin_b=1, method="slerp"), space.explore()
    figure = explorer_figure(explored, state, explored.view(state), np.empty((0, 2)), colour_points(np.arange(10), "c"))
    assert len(figure.axes) == 3


def test_classes_differ_by_their_marker_too(space: Space) -> None:
    classes = np.array(["a", "b", "c", "a", "b", "c", "a", "b", "c", "a"])
    figure = draw(space.explore(), State(), classes)
    points, handles = figure.axes[0].collections, figure.subfigs[0].legends[0].legend_handles
    assert [len(of_class.get_offsets()) for of_class in points] == [4, 3, 3]
    shapes = {of_class.get_paths()[0].vertices.tobytes() for of_class in points}
    assert len(shapes) == 3 and len({handle.get_marker() for handle in handles}) == 3


def test_many_points_are_plain_squares(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = np.array(["a", "b"] * 5)
    few = draw(space.explore(), State(), classes).axes[0].collections
    monkeypatch.setattr("workbench.explorer_figure.FEW", 9)
    figure = draw(space.explore(), State(), classes)
    many, handles = figure.axes[0].collections, figure.subfigs[0].legends[0].legend_handles
    assert [len(part.get_paths()[0].vertices) for part in few][0] > len(many[0].get_paths()[0].vertices)
    assert len({part.get_paths()[0].vertices.tobytes() for part in many}) == 1
    assert all(part.get_sizes() < few[0].get_sizes() and part.get_linewidths() == 0 for part in many)
    assert {handle.get_marker() for handle in handles} == {"s"}


@pytest.mark.parametrize("state", [State(), State(pin_a=2, pin_b=5)])
def test_the_key_of_the_pictures_stands_beside_them(space: Space, state: State) -> None:
    explored, key = space.explore(), {"kind": "classes", "label": "classes", "entries": [["wall", "#102030"]]}
    for view, labels in (
        (replace(explored.view(state), key=key), ["wall"]),
        (replace(explored.view(state), key={"kind": "layers", "label": "", "entries": [["a", 0, 1]]}), []),
        (None, []),
    ):
        colouring, route = colour_points(np.arange(10), "column"), explored.route(state)
        of_points, *of_pictures = explorer_figure(explored, state, view, route, colouring).subfigs[0].legends
        assert of_points.get_title().get_text() == "column"
        assert [text.get_text() for legend in of_pictures for text in legend.texts] == labels


def test_two_runs_have_a_row_each(space: Space, tmp_path: Path) -> None:
    paired = PairedExploration({"one": space.explore(), "other": space.explore()})
    figure = draw(paired, State(pin_a=2, pin_b=5), np.arange(10))
    assert len(figure.axes) == 1 + 2 * 9
    assert [ax.texts[0].get_text() for ax in (figure.axes[1], figure.axes[10])] == ["one", "other"]

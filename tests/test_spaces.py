from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from explored import PINNED, Space, clips, space
from PIL import Image, ImageSequence

from workbench.comparison import decode
from workbench.runs import Run
from workbench.spaces import Space as Walked
from workbench.spaces import State, save_strip

pytestmark = pytest.mark.usefixtures("one_thread")


def test_states_know_the_sample_that_is_shown() -> None:
    for state, sample, origin in (
        (State(), 0, 0),
        (State(mode="hover"), 0, 0),
        (State(mode="hover", hover=4, pin_a=2), 4, 2),
        (State(hover=4, pin_a=2, pin_b=3), 2, 2),
        (State(pin_a=2, pin_b=3, pinned="b"), 3, 2),
        (State(pin_a=2, pinned="b"), 2, 2),
        (State(mode="hover", pin_b=3, pinned="b"), 3, 0),
    ):
        assert (state.sample, state.origin) == (sample, origin), state


def test_what_is_explored_is_a_space(clips: Space) -> None:
    assert isinstance(clips.explore(), Walked)


# --- strips ---


def test_a_strip_holds_the_path_as_figure_animation_and_latents(space: Space, tmp_path: Path) -> None:
    explored, state = space.explore(), replace(PINNED, method="slerp")
    png, gif, npz = save_strip(explored, state, Run(tmp_path))
    assert [str(path.relative_to(tmp_path)) for path in (png, gif, npz)] == [
        "figures/strip-1.png",
        "samples/strip-1.gif",
        "samples/strip-1.npz",
    ]
    with np.load(npz) as stored:
        assert stored["method"] == "slerp" and stored["names"].tolist() == [space.samples.name(i) for i in (2, 5)]
        assert stored["ids"].tolist() == space.samples.batch(np.array([2, 5]))["id"].tolist()
        np.testing.assert_array_equal(stored["positions"], np.linspace(0, 1, 33))
        for position, z in list(zip(stored["positions"], stored["latents"], strict=True))[::8]:
            at = explored.view(replace(state, position=float(position))).z
            np.testing.assert_allclose(z, at, atol=1e-5)
        last = space.data.pixels(decode(space.model, torch.from_numpy(stored["latents"][-1:]))[0])
    frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(Image.open(gif))]
    factor = 320 // max(last.shape[:2])
    assert frames[-1].shape == (last.shape[0] * factor, last.shape[1] * factor, 3)
    drawn = frames[-1][factor // 2 :: factor, factor // 2 :: factor].astype(int)
    assert np.abs(drawn - last).mean() < 8, "up to a GIF's 256 colours"
    assert 2 <= len(frames) <= 33 and Image.open(png).format == "PNG"


def test_a_strip_never_takes_the_place_of_another(clips: Space, tmp_path: Path) -> None:
    explored, run = clips.explore(), Run(tmp_path)
    files = save_strip(explored, PINNED, run)
    before = {path: path.read_bytes() for path in files}
    (tmp_path / "samples" / "strip-2.gif").write_bytes(b"of another")
    names = [path.name for path in save_strip(explored, replace(PINNED, pin_b=7), run)]
    assert names == ["strip-3.png", "strip-3.gif", "strip-3.npz"]
    assert {path: path.read_bytes() for path in files} == before
    assert (tmp_path / "samples" / "strip-2.gif").read_bytes() == b"of another"


def test_without_a_path_no_strip_is_written(clips: Space, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no path yet"):
        save_strip(clips.explore(), State(), Run(tmp_path))
    assert list(tmp_path.iterdir()) == []

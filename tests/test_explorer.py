import io
from collections.abc import Callable

import ipywidgets
import numpy as np
import pytest
import torch
from PIL import Image

from workbench.explorer import condition_sliders, png


def parts(widget: ipywidgets.Widget) -> tuple[ipywidgets.Image, list[ipywidgets.Widget]]:
    picture, controls = widget.children
    return picture, list(controls.children)


def test_png_keeps_colours_shape_and_hard_edges() -> None:
    pixels = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 10
    drawn = np.asarray(Image.open(io.BytesIO(png(pixels, width=6))))
    assert drawn.shape == (4, 6, 3), "as wide as asked for, as high as the shape says"
    np.testing.assert_array_equal(drawn, pixels.repeat(2, 0).repeat(2, 1))


def bars(x: torch.Tensor) -> np.ndarray:
    """A sample of three numbers as three pixels."""
    return x.round().to(torch.uint8).reshape(1, 3, 1).expand(1, 3, 3).numpy()


def predicting(seen: list[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def predict(conditions: torch.Tensor) -> torch.Tensor:
        seen.append(conditions)
        return torch.cat([conditions, conditions.sum(1, keepdim=True)], 1)

    return predict


def test_condition_sliders_redraw_the_prediction_in_physical_units() -> None:
    seen: list[torch.Tensor] = []
    ranges = {"power [W]": (10.0, 110.0), "width [mm]": (-2.0, 2.0)}
    picture, (power, width, button) = parts(condition_sliders(predicting(seen), bars, ranges, [60.0, 1.0]))
    assert [(w.description, w.min, w.max, w.value) for w in (power, width)] == [
        ("power [W]", 10.0, 110.0, 60.0),
        ("width [mm]", -2.0, 2.0, 1.0),
    ]
    assert power.step == 1.0 and width.step == pytest.approx(0.04)
    own = picture.value
    assert seen[-1].tolist() == [[60.0, 1.0]] and own == png(bars(torch.tensor([60.0, 1.0, 61.0])))
    power.value = 100.0
    assert seen[-1].tolist() == [[100.0, 1.0]] and picture.value == png(bars(torch.tensor([100.0, 1.0, 101.0])))
    width.value = 2.0
    assert seen[-1].tolist() == [[100.0, 2.0]]
    button.click()
    assert (power.value, width.value) == (60.0, 1.0) and picture.value == own


def test_condition_sliders_need_a_start_for_each_range() -> None:
    with pytest.raises(ValueError, match="shorter"):
        condition_sliders(predicting([]), bars, {"a": (0.0, 1.0), "b": (0.0, 1.0)}, [0.5])

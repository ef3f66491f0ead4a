import io
from collections.abc import Callable

import ipywidgets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import conv_vae

from workbench.datasets.clips import Clips
from workbench.explorer import PATH_STEPS, condition_sliders, latent_sliders, path_slider, png
from workbench.interpolation import interpolate
from workbench.models.conv_vae import ConvVAE


@pytest.fixture(scope="module")
def model() -> ConvVAE:
    return conv_vae(ConvVAE).eval()


def decoded(model: ConvVAE, z: torch.Tensor) -> bytes:
    with torch.no_grad():
        return png(Clips.pixels(model.decode(z[None])[0]))


def parts(widget: ipywidgets.Widget) -> tuple[ipywidgets.Image, list[ipywidgets.Widget]]:
    picture, controls = widget.children
    return picture, list(controls.children)


def test_png_keeps_colours_shape_and_hard_edges() -> None:
    pixels = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 10
    drawn = np.asarray(Image.open(io.BytesIO(png(pixels, width=6))))
    assert drawn.shape == (4, 6, 3), "as wide as asked for, as high as the shape says"
    np.testing.assert_array_equal(drawn, pixels.repeat(2, 0).repeat(2, 1))


@pytest.mark.parametrize("method", ["lerp", "slerp"])
def test_the_path_slider_shows_what_the_path_decodes_to(model: ConvVAE, method: str) -> None:
    a, b = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-1.0, 1.5, 2.0])
    picture, (slider,) = parts(path_slider(model, Clips.pixels, a, b, method))
    path = interpolate(a, b, PATH_STEPS, method)
    assert picture.value == decoded(model, path[0]) and slider.description == f"{method} A-B"
    for value, step in ((1.0, 100), (0.5, 50), (0.07, 7), (0.0, 0)):
        slider.value = value
        assert picture.value == decoded(model, path[step])
    assert decoded(model, path[0]) != decoded(model, path[50]) != decoded(model, path[100])


def test_latent_sliders_move_their_dimension_and_reset(model: ConvVAE) -> None:
    z = torch.tensor([0.25, -4.0, 1.0])
    picture, (second, first, button) = parts(latent_sliders(model, Clips.pixels, z, [1, 0], span=3.0))
    assert (second.description, second.value, second.min, second.max) == ("z[1]", -4.0, -4.0, 3.0)
    assert (first.description, first.value, first.min, first.max) == ("z[0]", 0.25, -3.0, 3.0)
    own = decoded(model, z)
    assert picture.value == own
    first.value = 2.0
    assert picture.value == decoded(model, torch.tensor([2.0, -4.0, 1.0])) != own
    second.value = 1.5
    assert picture.value == decoded(model, torch.tensor([2.0, 1.5, 1.0]))
    button.click()
    assert picture.value == own and (first.value, second.value) == (0.25, -4.0)
    assert z.tolist() == [0.25, -4.0, 1.0], "the sample's latent was changed"


def test_dimensions_may_come_as_a_tensor(model: ConvVAE) -> None:
    _, (slider, _) = parts(latent_sliders(model, Clips.pixels, torch.zeros(3), torch.tensor([2]).tolist()))
    assert slider.description == "z[2]"


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

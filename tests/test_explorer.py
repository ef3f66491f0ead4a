import io

import ipywidgets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import conv_vae

from workbench.explorer import PATH_STEPS, latent_sliders, path_slider, png
from workbench.interpolation import interpolate
from workbench.models.conv_vae import ConvVAE


@pytest.fixture(scope="module")
def model() -> ConvVAE:
    return conv_vae(ConvVAE).eval()


def decoded(model: ConvVAE, z: torch.Tensor) -> bytes:
    with torch.no_grad():
        return png(model.decode(z[None])[0])


def parts(widget: ipywidgets.Widget) -> tuple[ipywidgets.Image, list[ipywidgets.Widget]]:
    picture, controls = widget.children
    return picture, list(controls.children)


def test_png_maps_minus_one_to_black_and_one_to_white() -> None:
    image = torch.tensor([-1.0, 0.0, 1.0, 2.0]).reshape(1, 2, 2).expand(3, 2, 2)
    pixels = np.asarray(Image.open(io.BytesIO(png(image, side=4))))
    assert pixels.shape == (4, 4, 3)
    assert pixels[:, :, 0].tolist() == [[0, 0, 128, 128]] * 2 + [[255] * 4] * 2, "hard edges, values clipped"


def test_png_of_a_grey_image() -> None:
    picture = Image.open(io.BytesIO(png(torch.zeros(1, 2, 2), side=2)))
    assert picture.mode == "L" and np.asarray(picture).tolist() == [[128, 128], [128, 128]]


@pytest.mark.parametrize("method", ["lerp", "slerp"])
def test_the_path_slider_shows_what_the_path_decodes_to(model: ConvVAE, method: str) -> None:
    a, b = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-1.0, 1.5, 2.0])
    picture, (slider,) = parts(path_slider(model, a, b, method))
    path = interpolate(a, b, PATH_STEPS, method)
    assert picture.value == decoded(model, path[0]) and slider.description == f"{method} A-B"
    for value, step in ((1.0, 100), (0.5, 50), (0.07, 7), (0.0, 0)):
        slider.value = value
        assert picture.value == decoded(model, path[step])
    assert decoded(model, path[0]) != decoded(model, path[50]) != decoded(model, path[100])


def test_latent_sliders_move_their_dimension_and_reset(model: ConvVAE) -> None:
    z = torch.tensor([0.25, -4.0, 1.0])
    picture, (second, first, button) = parts(latent_sliders(model, z, [1, 0], span=3.0))
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
    _, (slider, _) = parts(latent_sliders(model, torch.zeros(3), torch.tensor([2]).tolist()))
    assert slider.description == "z[2]"

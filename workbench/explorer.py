"""Live widgets: ipywidgets wired to pure functions; every one stands after a figure of the same content."""

import io
from collections.abc import Callable, Sequence

import ipywidgets
import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from workbench.comparison import decode
from workbench.interpolation import interpolate

SHOWN_PX = 256
PATH_STEPS = 101


def png(image: Float[Tensor, "c h w"], side: int = SHOWN_PX) -> bytes:
    """An image in [-1, 1] as PNG bytes, enlarged to `side` px with hard pixel edges."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(np.squeeze(pixels))
    buffer = io.BytesIO()
    picture.resize((side, side), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def path_slider(
    model: nn.Module, a: Float[Tensor, " d"], b: Float[Tensor, " d"], method: str = "lerp"
) -> ipywidgets.Widget:
    """A slider that walks from latent a (0) to latent b (1)."""
    path = interpolate(a, b, PATH_STEPS, method)
    slider = ipywidgets.FloatSlider(0, min=0, max=1, step=1 / (PATH_STEPS - 1), description=f"{method} A-B")
    return _linked([slider], lambda: path[round(slider.value * (PATH_STEPS - 1))], model)


def latent_sliders(
    model: nn.Module, z: Float[Tensor, " d"], dimensions: Sequence[int], span: float = 3.0
) -> ipywidgets.Widget:
    """One slider for each given dimension of z, in units of the prior's standard deviation, and a reset."""

    def slider(dimension: int) -> ipywidgets.FloatSlider:
        value = float(z[dimension])
        low, high = min(-span, value), max(span, value)
        return ipywidgets.FloatSlider(value, min=low, max=high, step=0.01, description=f"z[{dimension}]")

    sliders = [slider(int(dimension)) for dimension in dimensions]

    def latent() -> Tensor:
        moved = z.clone()
        for dimension, widget in zip(dimensions, sliders, strict=True):
            moved[int(dimension)] = widget.value
        return moved

    def reset(_: ipywidgets.Button) -> None:
        for dimension, widget in zip(dimensions, sliders, strict=True):
            widget.value = float(z[int(dimension)])

    button = ipywidgets.Button(description="reset", tooltip="back to the sample's own latent")
    button.on_click(reset)
    return _linked(sliders, latent, model, [button])


def _linked(
    sliders: Sequence[ipywidgets.Widget],
    latent: Callable[[], Tensor],
    model: nn.Module,
    more: Sequence[ipywidgets.Widget] = (),
) -> ipywidgets.Widget:
    """Sliders beside the picture of the latent they stand for; ipywidgets itself drops outdated moves."""
    picture = ipywidgets.Image(width=SHOWN_PX, height=SHOWN_PX, format="png")

    def draw(_: object = None) -> None:
        picture.value = png(decode(model, latent()[None])[0])

    for slider in sliders:
        slider.observe(draw, "value")
    draw()
    return ipywidgets.HBox([picture, ipywidgets.VBox([*sliders, *more])])

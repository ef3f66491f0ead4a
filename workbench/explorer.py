"""Live widgets: ipywidgets wired to pure functions; every one stands after a figure of the same content."""

import io
from collections.abc import Callable, Sequence

import ipywidgets
import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from workbench.comparison import decode
from workbench.interpolation import interpolate

SHOWN_PX = 320
PATH_STEPS = 101

Pixels = Callable[[Tensor], np.ndarray]
"""A sample as pixels (h, w, 3), uint8."""


def png(pixels: UInt8[np.ndarray, "h w 3"], width: int = SHOWN_PX) -> bytes:
    """Pixels as PNG bytes, enlarged to `width` px with hard pixel edges."""
    height = round(width * pixels.shape[0] / pixels.shape[1])
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def path_slider(
    model: nn.Module, pixels: Pixels, a: Float[Tensor, " d"], b: Float[Tensor, " d"], method: str = "lerp"
) -> ipywidgets.Widget:
    """A slider that walks from latent a (0) to latent b (1).

    Args:
        pixels: Draws a decoded sample: the `pixels` of the opened data.
    """
    path = interpolate(a, b, PATH_STEPS, method)
    slider = ipywidgets.FloatSlider(0, min=0, max=1, step=1 / (PATH_STEPS - 1), description=f"{method} A-B")
    return _linked([slider], lambda: pixels(decode(model, path[round(slider.value * (PATH_STEPS - 1))][None])[0]))


def latent_sliders(
    model: nn.Module, pixels: Pixels, z: Float[Tensor, " d"], dimensions: Sequence[int], span: float = 3.0
) -> ipywidgets.Widget:
    """One slider for each given dimension of z, in units of the prior's standard deviation, and a reset.

    Args:
        pixels: Draws a decoded sample: the `pixels` of the opened data.
    """

    def slider(dimension: int) -> ipywidgets.FloatSlider:
        value = float(z[dimension])
        low, high = min(-span, value), max(span, value)
        return ipywidgets.FloatSlider(value, min=low, max=high, step=0.01, description=f"z[{dimension}]")

    sliders = [slider(int(dimension)) for dimension in dimensions]

    def draw() -> np.ndarray:
        moved = z.clone()
        for dimension, widget in zip(dimensions, sliders, strict=True):
            moved[int(dimension)] = widget.value
        return pixels(decode(model, moved[None])[0])

    return _linked(sliders, draw, _reset(sliders))


def condition_sliders(
    predict: Callable[[Tensor], Tensor], pixels: Pixels, ranges: dict[str, tuple[float, float]], start: Sequence[float]
) -> ipywidgets.Widget:
    """One slider for each condition, in its own unit; the sample predicted from them beside, and a reset.

    Args:
        predict: Samples (b, ...) from conditions (b, d).
        pixels: Draws a sample: the `pixels` of the opened data.
        ranges: Smallest and largest value of each condition by its label.
        start: Where the sliders begin.
    """

    def slider(label: str, value: float) -> ipywidgets.FloatSlider:
        low, high = ranges[label]
        settings = {"min": low, "max": high, "step": (high - low) / 100, "readout_format": ".4g"}
        wide = {"style": {"description_width": "initial"}, "layout": {"width": "32em"}}
        return ipywidgets.FloatSlider(value, description=label, **settings, **wide)

    sliders = [slider(label, float(value)) for label, value in zip(ranges, start, strict=True)]

    def draw() -> np.ndarray:
        return pixels(predict(torch.tensor([[widget.value for widget in sliders]]))[0])

    return _linked(sliders, draw, _reset(sliders))


def _reset(sliders: Sequence[ipywidgets.FloatSlider]) -> ipywidgets.Button:
    """A button that puts sliders back to where they begin."""
    values = [widget.value for widget in sliders]
    button = ipywidgets.Button(description="reset", tooltip="back to where the sliders began")

    def reset(_: ipywidgets.Button) -> None:
        for widget, value in zip(sliders, values, strict=True):
            widget.value = value

    button.on_click(reset)
    return button


def _linked(
    sliders: Sequence[ipywidgets.Widget], draw: Callable[[], np.ndarray], *more: ipywidgets.Widget
) -> ipywidgets.Widget:
    """Sliders beside the picture they stand for; ipywidgets itself drops outdated moves."""
    picture = ipywidgets.Image(width=SHOWN_PX, format="png")

    def redraw(_: object = None) -> None:
        picture.value = png(draw())

    for slider in sliders:
        slider.observe(redraw, "value")
    redraw()
    return ipywidgets.HBox([picture, ipywidgets.VBox([*sliders, *more])])

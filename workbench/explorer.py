"""Sliders of conditions beside the sample predicted from them; a figure of the same content stands before them."""

import io
from collections.abc import Callable, Sequence

import ipywidgets
import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

SHOWN_PX = 320

Pixels = Callable[[Tensor], np.ndarray]
"""A sample as pixels (h, w, 3), uint8."""


def png(pixels: UInt8[np.ndarray, "h w 3"], width: int = SHOWN_PX) -> bytes:
    """Pixels as PNG bytes, enlarged to `width` px with hard pixel edges."""
    height = round(width * pixels.shape[0] / pixels.shape[1])
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


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

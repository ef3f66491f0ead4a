"""One function that opens data of any kind, and what notebooks rely on in all of them."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from workbench.config import Config, ConfigError, nearest
from workbench.datasets.clips import ClipsConfig, open_clips
from workbench.datasets.fields import SimulationConfig
from workbench.datasets.layouts import LayoutsConfig, open_layouts
from workbench.datasets.loading import Batch, Dataset
from workbench.datasets.simulation import open_simulation
from workbench.datasets.weights import WeightsConfig, open_weights


class DataKind(Config):
    """Which kind of data the others describe."""

    data_kind: Literal["clips", "simulation", "layouts", "weights"]


DATA = {
    "clips": (ClipsConfig, open_clips),
    "simulation": (SimulationConfig, open_simulation),
    "layouts": (LayoutsConfig, open_layouts),
    "weights": (WeightsConfig, open_weights),
}
"""For each kind of data, its settings and the function that opens it."""


@runtime_checkable
class Data(Protocol):
    """Opened data of any kind."""

    config: Config
    report: dict[str, Any]
    """Counts and sizes that describe the data."""
    condition_names: list[str]
    error_name: str
    """The error by which models are compared, a key of `errors`."""
    error_label: str
    group_name: str
    """What a group is, in the plural."""
    main_column: str
    """The column of a split's table that colours a map when none is asked for."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def condition_fingerprint(self) -> str: ...
    @property
    def sizes(self) -> dict[str, int]: ...
    def split(self, name: str) -> Dataset: ...
    def table(self) -> pd.DataFrame: ...
    def errors(self, x_hat: Tensor, x: Tensor) -> dict[str, Tensor]: ...
    def error(self, x_hat: Tensor, x: Tensor) -> Tensor: ...
    def grid(self, rows: dict[str, Tensor], titles: Sequence[str] | None, column_label: str) -> Figure: ...
    def pairs(self, x: Tensor, x_hat: Tensor) -> Figure: ...
    def compare(self, x: Tensor, predictions: dict[str, Tensor]) -> Figure: ...
    def condition_label(self, name: str) -> str: ...
    def pixels(self, x: Tensor) -> np.ndarray: ...
    def key(self, batch: Batch) -> dict[str, Any]:
        """Legend of `pixels` of the first sample of a prepared batch; empty where they need none.

        `kind`: `numbers` or `classes`, with `entries` of text and colour (#rrggbb), or `layers`, with `entries` of
        name, start and end [share of the height]; and a `label`.
        """

    def examples(self, n: int) -> Figure: ...
    @property
    def broken(self) -> pd.DataFrame: ...
    def statistics(self) -> dict[str, Tensor]: ...


def open_data(parameters: Mapping[str, Any]) -> Data:
    """Open the data that a flat set of parameters describes, of the kind that its `data_kind` names.

    Raises:
        ConfigError: unknown kind, or a setting out of range.
        DataError: anything about the data that cannot be used as it is.
    """
    kind = parameters["data_kind"]
    if kind not in DATA:
        raise ConfigError([(f"data_kind={kind!r}", nearest(kind, DATA))])
    config_class, open_kind = DATA[kind]
    return open_kind(config_class.pick(parameters))

"""Which networks of a zoo are used, and the order in which a balanced epoch sees them."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Int
from pandas.api.types import is_bool_dtype, is_numeric_dtype

from workbench.datasets.frames import DataError
from workbench.datasets.splits import mix

NAMED = 3  # examples in a message
SHOWN_VALUES = 20
ALL = ("", "joint")
"""Values of `trained_on` that keep the networks of every data set."""


def parse_where(where: Sequence[str]) -> dict[str, list[str]]:
    """Wanted values by property, from `property=value`; several values of one property are alternatives.

    Raises:
        ValueError: an entry is not of that form.
    """
    wanted: dict[str, list[str]] = {}
    for text in where:
        name, equals, value = text.partition("=")
        if not (name.strip() and equals and value.strip()):
            raise ValueError(f"where={text!r}: must read property=value")
        wanted.setdefault(name.strip(), []).append(value.strip())
    return wanted


def keep(table: pd.DataFrame, wanted: Iterable[tuple[str, Sequence[str]]]) -> Int[np.ndarray, " n"]:
    """Positions of the networks that have one of the wanted values in every property named; compared as text.

    Raises:
        DataError: no such property; a value that no network has; no network has all of them.
    """
    kept, asked = np.ones(len(table), bool), []
    for name, values in wanted:
        found = table[_known(table, name)].astype(str)
        absent = [value for value in values if not (found == value).any()]
        if absent:
            there = sorted(found.unique())
            listed = ", ".join(there[:SHOWN_VALUES]) + (", ..." if len(there) > SHOWN_VALUES else "")
            raise DataError(f"{name}={absent[0]}: no network has this value; there are {listed}")
        kept &= found.isin(values).to_numpy()
        asked.append(f"{name}={' or '.join(values)}")
    if not kept.any():
        raise DataError(f"no network has {' and '.join(asked)} together; ask for less")
    return np.flatnonzero(kept)


def best(table: pd.DataFrame, networks: Int[np.ndarray, " n"], topk: int, topk_by: str) -> Int[np.ndarray, " k"]:
    """Positions of the networks, of those given, in which a property is highest; ties go to the first id.

    Args:
        topk: How many (0: all).
        topk_by: The property; with a minus before it, the networks in which it is lowest.

    Raises:
        DataError: no such property, it is no number, or NaN in a network; there are fewer networks.
    """
    if not topk:
        return networks
    name = _known(table, topk_by.removeprefix("-"))
    values = table[name].iloc[networks]
    if not is_numeric_dtype(values) or is_bool_dtype(values):
        raise DataError(f"topk_by={topk_by!r}: must be a property that is a number; {name!r} has {values.iloc[0]!r}")
    lacking = table["id"].iloc[networks[values.isna().to_numpy()]].tolist()
    if lacking:
        raise DataError(
            f"topk_by={topk_by!r}: is NaN in {len(lacking)} networks, such as {lacking[0]!r}; leave them out"
        )
    if topk > len(networks):
        raise DataError(f"topk={topk}: there are {len(networks)} networks to choose from; lower it, or set it to 0")
    ids = table["id"].iloc[networks].to_numpy(str)
    order = np.lexsort((ids, values))
    if topk_by[0] != "-":  # not by -values, which unsigned and the lowest whole numbers have not
        last = np.argsort(ids, kind="stable")[::-1]
        order = last[np.argsort(values.to_numpy()[last], kind="stable")][::-1]
    return np.sort(networks[order[:topk]])


def _known(table: pd.DataFrame, name: str) -> str:
    if name not in table:
        there = ", ".join(table.columns)
        raise DataError(f"property {name!r}: the networks have {there}; correct where, trained_on or topk_by")
    return name


def check_runs(table: pd.DataFrame, given: Sequence[str]) -> None:
    """Refuse networks of several epochs or steps without their training run: it could fall on two sides of a split.

    Args:
        table: The networks that are used.
        given: The properties that their files hold.

    Raises:
        DataError: there is a property `epoch` or `step` of several values, and none `run`.
    """
    for name in ("epoch", "step"):
        values = table[name].nunique() if name in table else 0
        if values > 1 and "run" not in given:
            raise DataError(
                f"networks have the property {name!r}, with {values} different values, and no property 'run': all "
                f"{name}s of one training must be in one split; add 'run' to all networks, or choose one {name} by "
                "where"
            )


def fitting_length(ids: Sequence[str], sizes: Int[np.ndarray, " n"], max_len: int) -> int:
    """Length of the padded samples: that asked for, or that of the longest network for 0.

    Args:
        sizes: Weights of each network.

    Raises:
        DataError: networks are longer.
    """
    limit = max_len or int(sizes.max())
    longer = np.flatnonzero(sizes > limit)
    if len(longer):
        named = ", ".join(f"{ids[i]!r} ({sizes[i]})" for i in longer[:NAMED])
        rest = ", ..." if len(longer) > NAMED else ""
        raise DataError(
            f"max_len={limit}: {len(longer)} of {len(sizes)} networks have more weights: {named}{rest}; nothing is cut "
            f"off: set it to at least {sizes.max()}, or to 0, or leave them out by where"
        )
    return limit


def balanced_order(labels: Int[np.ndarray, " n"], seed: int, epoch: int) -> Int[np.ndarray, " n"]:
    """Samples of an epoch in which every label comes equally often: a function of (seed, epoch) alone.

    The epoch has as many samples as there are; it goes through the labels in turn, in a new order each time, and
    through the samples of each label in random order, from the start when they are used up. So samples of a rare label
    come repeatedly, and of a frequent one each epoch has others.

    Args:
        labels: Of each sample.
    """
    rng = np.random.default_rng(mix(seed, 6, epoch))
    counts = np.unique(labels, return_counts=True)[1]
    of_label = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    rounds = -(-len(labels) // len(counts))
    drawn = np.empty((rounds, len(counts)), np.int64)
    for column, samples in enumerate(of_label):
        passes = -(-rounds // len(samples))
        drawn[:, column] = np.concatenate([rng.permutation(samples) for _ in range(passes)])[:rounds]
    return rng.permuted(drawn, axis=1).ravel()[: len(labels)]

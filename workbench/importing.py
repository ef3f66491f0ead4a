"""Files that configure SimulGen-VAE, turned into parameter files of the notebooks.

A line of `condition.txt` holds a key and its value; `%` begins a section, `'` a separator, `#` a comment; the first
line is a title. `preset.txt` holds five lines by position. Both are read strictly.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from workbench.config import ConfigError, nearest
from workbench.simulgen import (
    CONDITIONER,
    DEFAULTS,
    INSPECT,
    KEYS,
    PRESET,
    SWITCHED,
    SWITCHES,
    TERMS,
    VAE,
    WALK,
    Key,
)

_DATA = {
    "data_kind": ("simulation", ""),
    "data": ("fields.npy", "set this to your file"),
    "scaling": ("node", "as the source always does"),
    "condition_colour": ("grey", "as the source always does"),
}
FIXED: dict[str, dict[str, tuple[Any, str]]] = {
    INSPECT: {"run": ("data", ""), **_DATA},
    VAE: {
        "run": ("vae", ""),
        **_DATA,
        "large": (False, "true for a model of --size=large"),
        "spectral_norm": (True, "as the source always does"),
        "output_norm": (True, "as the source always does"),
        "all_codes": (False, "the source leaves the code of the first level unread"),
        "schedule": ("cosine", "as the source does, without its restarts"),
        "kl_weight": (1.0, "as the source always does"),
        "kl_weight_start": (1e-4, "as the source always does"),
        "kl_rise_from": (0.3, "as the source always does"),
        "kl_rise_to": (0.8, "as the source always does"),
    },
    CONDITIONER: {"run": ("conditioner", ""), "vae_run": ("vae", "")},
    WALK: {"run": ("walk", ""), "vae_run": ("vae", "")},
}
"""What every imported folder begins with: value and comment, by notebook and parameter."""


@dataclass
class _Entry:
    """A value of the source: its text, what it was read as, the place it stands at, a comment for our file."""

    text: str
    value: Any
    place: str = ""
    comment: str = ""


def import_config(condition: Path, preset: Path | None, out: Path) -> list[str]:
    """Write the parameter files of notebooks 01 to 04 from the source's condition.txt, and preset.txt where given.

    Args:
        condition: Keys and values of the source.
        preset: Its file of layer sizes; None: those keep the notebooks' defaults.
        out: Folder for the four files, made here; it may be there if it is empty.

    Returns:
        A line for each value that could not be carried over as it is: key, value, place, reason.

    Raises:
        ConfigError: a file that cannot be read; an unknown or a repeated key; a value of the wrong type or out of
            range; a folder that holds something. Nothing is written then.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError([(str(out), "exists and is not an empty folder: give another; nothing is overwritten")])
    entries, lines = _read_condition(condition)
    _check_ranges(entries)
    entries |= _read_preset(preset) if preset else {}
    header = [f"Imported from {condition.name}{f' and {preset.name}' if preset else ''}."]
    counts = {"Dim1": "runs", "num_var": "variables"}
    header += [
        f"The source counts {entries[key].text} {what} ({key})." for key, what in counts.items() if key in entries
    ]
    lines += _settle(entries)
    parameters = {notebook: dict(fixed) for notebook, fixed in FIXED.items()}
    parameters[CONDITIONER] |= _sizes(entries)
    for key, kind in (KEYS | PRESET).items():
        entry = entries.get(key)
        if entry and kind.name:
            comment = entry.comment or "; ".join(filter(None, (key, kind.remark)))
            for notebook in kind.notebooks:
                parameters[notebook][kind.name] = entry.value, comment
        elif entry and kind.reason and not (kind.idle and entry.value == kind.read(kind.idle)):
            lines.append(_line(key, entry, kind.reason))
    _write(parameters, header, out)
    return lines


def _line(key: str, entry: _Entry, reason: str) -> str:
    return f"{key}={entry.text} ({entry.place}): {reason}"


# --- reading ---


def _text(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ConfigError([(str(path), f"cannot be read: {error.strerror}")]) from None
    except UnicodeDecodeError:
        raise ConfigError([(str(path), "is not text in UTF-8")]) from None


def _read(key: str, kind: Key, text: str, place: str, problems: list[tuple[str, str]]) -> _Entry:
    try:
        return _Entry(text, kind.read(text), place)
    except ValueError as error:
        problems.append((f"{key}={text} in {place}", str(error)))
        return _Entry(text, None, place)


def _read_condition(path: Path) -> tuple[dict[str, _Entry], list[str]]:
    """The keys of condition.txt; and a line for each placeholder that holds something."""
    entries: dict[str, _Entry] = {}
    problems: list[tuple[str, str]] = []
    lines = []
    for number, line in enumerate(_text(path), 1):
        words, place = line.partition("#")[0].split(), f"{path}, line {number}"
        if not words or words[0][0] in "%'" or (number == 1 and _is_title(words)):
            continue
        key, text = words[0], " ".join(words[1:])
        if key != "RESERVED" and key not in KEYS:
            problems.append((f"unknown key {key!r} in {place}", nearest(key, KEYS)))
        elif len(words) != 2:
            problems.append(
                (f"{key} in {place}", f"has {len(words) - 1} values, must have one; a comment begins with #")
            )
        elif key == "RESERVED":
            lines += [_line(key, _Entry(text, text, place), "a placeholder without a meaning")] * (text != "0")
        elif key in entries:
            problems.append((f"{key} in {place}", f"is given before, in {entries[key].place}; remove one"))
        else:
            entries[key] = _read(key, KEYS[key], text, place, problems)
    if not entries and not problems:
        problems = [(str(path), "holds no key, such as Dim1; give the source's condition.txt")]
    if problems:
        raise ConfigError(problems)
    return entries, lines


def _is_title(words: list[str]) -> bool:
    """Whether a first line is a title, and not a key with its value."""
    return words[0] not in KEYS and not (len(words) == 2 and re.fullmatch(r"[-+.0-9e]+", words[1]))


def _read_preset(path: Path) -> dict[str, _Entry]:
    """The lines of preset.txt by position; its first line names them and is not read."""
    texts = [" ".join(line.partition("#")[0].split()) for line in _text(path)]
    while texts and not texts[-1]:
        texts.pop()
    if len(texts) != 1 + len(PRESET):
        rule = f"has {len(texts)} lines, must have {1 + len(PRESET)}: a title, {', '.join(PRESET)}"
        raise ConfigError([(str(path), rule)])
    problems: list[tuple[str, str]] = []
    entries = {
        key: _read(key, PRESET[key], text, f"{path}, line {number}", problems)
        for number, (key, text) in enumerate(zip(PRESET, texts[1:], strict=True), 2)
    }
    if problems:
        raise ConfigError(problems)
    return entries


def _check_ranges(entries: dict[str, _Entry]) -> None:
    """What must hold between keys."""
    bounds = [("Dim2_red", "Dim2", 0), ("Dim3_red", "Dim3", 0), ("Dim3_end", "Dim3", 0), ("Dim3_start", "Dim3", 1)]
    bounds.append(("Dim3_start", "Dim3_end", 1))
    problems = [
        (f"{key}={entries[key].text} in {entries[key].place}", f"must be {rule} {top}={entries[top].text}")
        for key, top, less in bounds
        for rule in ("at most", "less than")[less : less + 1]
        if key in entries and top in entries and entries[key].value + less > entries[top].value
    ]
    components = entries.get("pca_components")
    if _on(entries, "use_pca") and not (components and components.value):
        problems.append((f"use_pca=1 in {entries['use_pca'].place}", "needs pca_components of at least 1"))
    if problems:
        raise ConfigError(problems)


# --- what several keys say together ---


def _on(entries: dict[str, _Entry], switch: str) -> bool:
    return switch in entries and entries[switch].text == "1"


def _settle(entries: dict[str, _Entry]) -> list[str]:
    """Put every key at the value that counts; a line for each that counts for nothing."""
    lines = []
    for key, text in DEFAULTS.items():
        entries.setdefault(key, _Entry(text, KEYS[key].read(text), "", f"the source's value, without {key}"))
    for switch, keys in SWITCHES.items():
        for key in [] if _on(entries, switch) else [key for key in keys if key in entries]:
            entry = entries.pop(key)
            if entry.value:
                lines.append(_line(key, entry, f"has no effect without {switch}"))
    for switch, (key, text, off) in SWITCHED.items():
        if not _on(entries, switch):
            entries[key] = _Entry("", off, "", f"no {switch}")
        entries.setdefault(key, _Entry(text, KEYS[key].read(text), "", f"the source's value, without {key}"))
    for switch, keys in TERMS.items():
        if switch in entries and not _on(entries, switch):
            entries |= {key: _Entry("0", 0.0, "", f"{switch} is 0") for key in keys}
    if "LC_alpha" in entries:
        weight, alpha = entries["latent_reg_weight"], entries["LC_alpha"]
        comment = f"latent_reg_weight={weight.text} / LC_alpha={alpha.text}"
        entries["latent_reg_weight"] = _Entry(weight.text, weight.value / alpha.value, weight.place, comment)
    return lines + _settle_nodes(entries) + _settle_conditions(entries)


def _settle_nodes(entries: dict[str, _Entry]) -> list[str]:
    if "Dim3_red" in entries and entries.keys() & {"Dim3_start", "Dim3_end"}:
        return [_line("Dim3_red", entries.pop("Dim3_red"), "the range is that of Dim3_start and Dim3_end")]
    return []


def _settle_conditions(entries: dict[str, _Entry]) -> list[str]:
    kind, path = entries.get("input_type"), entries.get("param_dir")
    pictures = kind is None or kind.value == "cnn"
    if kind and pictures and _on(entries, "use_pca"):
        entries["input_type"] = _Entry(kind.text, "mlp", kind.place, "input_type; components are a row of numbers")
    if path and pictures:
        path.value = path.value.lstrip("/") or "."  # the source puts its working folder before it
    if path and not pictures:
        return [_line("param_dir", path, "the source's CSV has no header; write the columns' names as its first line")]
    return []


def _sizes(entries: dict[str, _Entry]) -> dict[str, tuple[int, str]]:
    """Width and depth of the conditioner, where the source's layers have the form of ours."""
    kind, layers = entries.get("input_type"), entries.get("latent_conditioner_filter")
    if not (kind and layers):
        return {}
    first, depth = layers.value[0], len(layers.value)
    if layers.value != [first * (2 if kind.value == "cnn" else 1) ** i for i in range(depth)]:
        return {}
    del entries["latent_conditioner_filter"]
    comment = f"latent_conditioner_filter={layers.text}"
    return {"width": (first, comment), "depth": (depth, comment)}


# --- writing ---


def _write(parameters: dict[str, dict[str, tuple[Any, str]]], header: list[str], out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        for notebook, content in parameters.items():
            texts = [f"# {line}" for line in (header if notebook == INSPECT else header[:1])]
            texts += [
                f"{name}: {_yaml(value)}{f'  # {comment}' if comment else ''}"
                for name, (value, comment) in content.items()
            ]
            (out / f"{notebook}.yaml").write_text("\n".join(texts) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError([(str(out), f"cannot be written: {error.strerror}")]) from None


def _yaml(value: Any) -> str:
    """A value on one line, which YAML 1.1 reads as what it is: 1.0e-06, not 1e-6."""
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.removesuffix("...\n").strip()

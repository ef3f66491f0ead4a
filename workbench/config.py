"""Checked settings: a frozen pydantic model whose errors name the key, the value, the rule and the remedy."""

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

C = TypeVar("C", bound="Config")


class ConfigError(ValueError):
    """Settings that are unknown, of the wrong type or out of range; the message holds one line for each.

    Args:
        problems: (what, rule) pairs, such as ("latent_dim=0", "must be at least 1").
        source: File the settings come from; empty when they come from code.
    """

    def __init__(self, problems: Iterable[tuple[str, str]], source: str = "") -> None:
        self.problems = list(problems)
        place = f" in {source}" if source else ""
        super().__init__("\n".join(f"{what}{place}: {rule}" for what, rule in self.problems))

    def at(self, source: str) -> "ConfigError":
        """The same error, naming the file."""
        return ConfigError(self.problems, source)


class Config(BaseModel):
    """Base of every settings class: no extra keys, no type coercion, immutable.

    Raises:
        ConfigError: at construction, with one line per offending key.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(problems(error, type(self).model_fields)) from None

    @classmethod
    def pick(cls: type[C], parameters: Mapping[str, Any]) -> C:
        """Build from the entries of a flat parameter dict that this class knows; the others are ignored."""
        return cls(**{name: parameters[name] for name in cls.model_fields if name in parameters})


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for the closest known name, or the list of them where none is close."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"must be one of {', '.join(known)}"


def problems(error: ValidationError, known: Iterable[str]) -> list[tuple[str, str]]:
    """What pydantic found, as (what, rule) pairs in the words of this project."""
    found = []
    for problem in error.errors():
        name = "".join(f"[{part}]" if isinstance(part, int) else str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            found.append((f"unknown parameter {name!r}", nearest(name, known)))
        elif name:
            found.append((f"{name}={problem['input']!r}", rule(problem)))
        else:
            what, _, text = problem["msg"].removeprefix("Value error, ").partition(": ")
            found.append((what, text))
    return found


def rule(problem: Mapping[str, Any]) -> str:
    """The broken rule in words, with the remedy where one is known."""
    context = problem.get("ctx", {})
    match problem["type"]:
        case "greater_than_equal":
            return f"must be at least {context['ge']:g}"
        case "greater_than":
            return f"must be more than {context['gt']:g}"
        case "less_than_equal":
            return f"must be at most {context['le']:g}"
        case "less_than":
            return f"must be less than {context['lt']:g}"
        case "literal_error":
            return f"must be {context['expected']}"
        case "missing":
            return "must be given"
        case "float_type" | "int_type" if _is_number(problem["input"]):
            return _number_in_text(problem["input"], whole=problem["type"] == "int_type")
        case "float_type":
            return "must be a number"
        case "finite_number":
            return "must be finite"
        case "int_type" | "int_from_float":
            return "must be a whole number"
        case "bool_type":
            return "must be true or false"
        case "string_type":
            return "must be text; put it in quotes"
        case "list_type":
            return "must be a list, such as [32, 64, 128]"
        case "too_short":
            least = context["min_length"]
            return f"must have at least {least} {'entry' if least == 1 else 'entries'}"
        case _:
            return problem["msg"].removeprefix("Value error, ")


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False


def _number_in_text(text: str, whole: bool) -> str:
    """What to write in place of a number that arrived as text; YAML 1.1 wants a dot and a sign in 1.0e-4."""
    value, (mantissa, _, exponent) = float(text), text.strip().lower().partition("e")
    if whole and not value.is_integer():
        return "must be a whole number"
    if not exponent:
        return f"must be a number, and this is text: write {mantissa} without quotes"
    decimal = f"{value:.17f}".rstrip("0").rstrip(".")
    full = f"{mantissa if '.' in mantissa else mantissa + '.0'}e{int(exponent):+d}"
    ways = [full] * (not whole) + [decimal] * (float(decimal) == value)
    return f"must be a number, and YAML reads {text.strip()} as text: write {' or '.join(ways)} without quotes"

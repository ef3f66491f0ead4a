"""Checked settings: a frozen pydantic model whose errors name the key, the value, the rule and the remedy."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError


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
    def pick(cls, parameters: Mapping[str, Any]) -> Self:
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
        name = str(problem["loc"][0]) if problem["loc"] else ""
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
            return f"must be at least {context['ge']}"
        case "greater_than":
            return f"must be more than {context['gt']}"
        case "less_than_equal":
            return f"must be at most {context['le']}"
        case "less_than":
            return f"must be less than {context['lt']}"
        case "literal_error":
            return f"must be {context['expected']}"
        case "missing":
            return "must be given"
        case "float_type" | "int_type" if _is_number(problem["input"]):
            return (
                f"must be a number, and this is text; YAML reads 1e-4 as text: write "
                f"{_as_yaml(float(problem['input']))} without quotes"
            )
        case "float_type":
            return "must be a number"
        case "int_type" | "int_from_float":
            return "must be a whole number"
        case "bool_type":
            return "must be true or false"
        case "string_type":
            return "must be text; put it in quotes"
        case "list_type":
            return "must be a list, such as [32, 64, 128]"
        case _:
            return problem["msg"].removeprefix("Value error, ")


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return isinstance(value, str)


def _as_yaml(value: float) -> str:
    """A float as YAML 1.1 reads it back: an exponent needs a dot before it."""
    text = repr(value)
    return text.replace("e", ".0e") if "e" in text and "." not in text else text

"""Sections of a job file: what all of their pydantic models share.

Sections are frozen (a run cannot change what it was asked to do), refuse keys that they do not have, and take numbers
in every way that people write them in YAML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

__all__ = [
    "PARSED",
    "Count",
    "Fraction",
    "NotNegative",
    "Positive",
    "Section",
    "Text",
    "keep_own",
    "own_keys",
    "refuse",
]


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 (no dot) as text, and pydantic would take `true` for 1."""
    if isinstance(value, bool):
        raise ValueError("a boolean is no number")
    return float(value) if isinstance(value, str) else value


PARSED = BeforeValidator(_number)
Count = Annotated[int, Field(ge=1), PARSED]
Fraction = Annotated[float, Field(ge=0, lt=1), PARSED]
Positive = Annotated[float, Field(gt=0), PARSED]
NotNegative = Annotated[float, Field(ge=0), PARSED]
Text = Annotated[str, Field(min_length=1)]


def refuse(text: str) -> PydanticCustomError:
    """An error whose text is shown as it is, after the key."""
    return PydanticCustomError("job", "{text}", {"text": text})


def own_keys(section: BaseModel, belonging: Mapping[str, Sequence[str]]) -> None:
    """Refuse keys that belong to another `name` than the section's, since they would be without effect."""
    name = str(getattr(section, "name"))  # noqa: B009  (BaseModel has no `name` for mypy)
    special = {key for keys_of_name in belonging.values() for key in keys_of_name}
    for key in sorted(section.model_fields_set & special - set(belonging[name])):
        names = " and ".join(other for other, its in belonging.items() if key in its)
        raise refuse(f'{key} belongs to {names}, not to {name}; remove it (or write "name: {names.split()[0]}")')


class Section(BaseModel):
    """The base of all sections."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _empty(cls, data: Any) -> Any:
        """A section whose keys are all commented out reads as null, and means the defaults."""
        return {} if data is None else data


def keep_own(values: dict[str, Any], belonging: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The values without the keys that belong to another `name`."""
    others = {key for its in belonging.values() for key in its} - set(belonging[values["name"]])
    return {key: value for key, value in values.items() if key not in others}

"""The base of all models here: plain, immutable data, camelCase on the wire."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

_fields_set: dict[frozenset[str], set[str]] = {}


def camel_case(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(part.capitalize() for part in others)


class Immutable(BaseModel):
    model_config = ConfigDict(frozen=True, populate_by_name=True, alias_generator=camel_case)

    def model_post_init(self, context: Any) -> None:
        """Which fields were set is the same for most models of a kind, and is kept once for all of them.

        As a set of each one's own it was the larger half of an operator's view of a thousand objects and their engines.
        """
        own = self.__pydantic_fields_set__
        object.__setattr__(self, "__pydantic_fields_set__", _fields_set.setdefault(frozenset(own), own))

"""A key map as data: rules that pair a tensor's name in diffusers' layout with its name in another.

Each half of a rule is a template. A field in braces stands for the part that varies:

- ``{up}``: a level that the original counts from the other end;
- ``{nth}``: a number that the original counts from 1;
- any other field is listed in ``KeyMap.fields``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from sdconv.checkpoint.keys.prefixes import DEEPEST

Rules = tuple[tuple[str, str], ...]
"""Pairs of templates, diffusers' first."""

Fields = Mapping[str, str | Mapping[str, str]]
"""What a field stands for: a regular expression for text that both sides share, or a table from
diffusers' word to the original's."""

NUMBER = r"[0-9]{1,4}"

_CANONICAL, _ORIGINAL = 0, 1


def of_tensors(rules: Iterable[tuple[str, str]]) -> Rules:
    """Turns rules for modules into rules for their tensors, whose names end with ``{tail}``."""
    return tuple((f"{ours}.{{tail}}", f"{original}.{{tail}}") for ours, original in rules)


@dataclass(frozen=True)
class KeyMap:
    """The names of one network's tensors, in both directions.

    Args:
        rules: for whole names of tensors.
        fields: what the fields in the rules stand for.
        levels: how many levels the network has, where a rule has ``{up}``.
    """

    rules: Rules
    fields: Fields
    levels: int = 0

    def canonical(self, original: str) -> str | None:
        """diffusers' name for the tensor that the original layout calls ``original``; None if no
        rule matches."""
        return self._translate(original, _ORIGINAL, _CANONICAL)

    def original(self, canonical: str) -> str | None:
        """The original layout's name for diffusers' ``canonical``; None if no rule matches."""
        return self._translate(canonical, _CANONICAL, _ORIGINAL)

    def _translate(self, name: str, side: int, target: int) -> str | None:
        words = name.split(".", DEEPEST)
        for count in range(len(words) + 1):
            start = ".".join(words[:count])
            for template, rule in self._by_start[side].get(start, ()):
                rest = name[len(start) + 1 :] if count else name
                if match := self._pattern(template, side).fullmatch(rest):
                    values = {k: self._value(k, v, target) for k, v in match.groupdict().items()}
                    if None not in values.values():
                        return rule[target].format(**values)
        return None

    @cached_property
    def _by_start(self) -> tuple[dict[str, list[tuple[str, tuple[str, str]]]], ...]:
        """For each side, the words before a template's first field -> the rest of the template and
        its rule."""
        tables: tuple[dict[str, list[tuple[str, tuple[str, str]]]], ...] = ({}, {})
        for rule in self.rules:
            for table, template in zip(tables, rule, strict=True):
                start = template.partition("{")[0].rpartition(".")[0]
                rest = template[len(start) + 1 :] if start else template
                table.setdefault(start, []).append((rest, rule))
        return tables

    @cached_property
    def _patterns(self) -> dict[tuple[str, int], re.Pattern[str]]:
        return {}

    def _pattern(self, template: str, side: int) -> re.Pattern[str]:
        """The regular expression for a template, compiled once."""
        if (template, side) not in self._patterns:
            parts = re.split(r"\{(\w+)\}", template)  # text and fields in turn
            parts[0::2] = map(re.escape, parts[0::2])
            parts[1::2] = (f"(?P<{name}>{self._expression(name, side)})" for name in parts[1::2])
            self._patterns[template, side] = re.compile("".join(parts))
        return self._patterns[template, side]

    def _expression(self, field: str, side: int) -> str:
        values = self.fields.get(field, NUMBER)
        if isinstance(values, str):
            return values
        return "|".join(map(re.escape, values.values() if side else values))

    def _value(self, field: str, value: str, target: int) -> str | None:
        """A field's text on the target side; None for a number that the target does not have."""
        if field in ("up", "nth"):
            number = int(value)
            if field == "up":
                number = self.levels - 1 - number
            else:
                number += 1 if target == _ORIGINAL else -1
            return None if number < 0 else str(number)
        table = self.fields[field]
        if isinstance(table, str):
            return value
        if target == _ORIGINAL:
            return table[value]
        return next(ours for ours, original in table.items() if original == value)

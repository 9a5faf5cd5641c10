"""Which variants of the fast backend's operations are fastest: part of the ``speed`` stage.

The table is ``sdconv.fast.cuda.choices``. Each variant that it does not have yet is put into it
alone; those that are faster are put into it together; and if that is faster than the table as it
is, ``DIR/choices.json`` has it, for ``choices.load``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from scripts.gpu.record import Record

# a variant has to be faster by this factor: smaller differences are noise
FASTER = 0.99
AS_IT_IS = "variants: the table as it is"
TOGETHER = "variants: the fastest together"


def add(record: Record, choices: Any, measure: Callable[[], dict[str, Any]], least: float) -> None:
    """Adds rows for the variants, and writes the table that is fastest.

    Args:
        record: the stage's.
        choices: the module ``sdconv.fast.cuda.choices``.
        measure: returns a row's values, ``milliseconds`` among them, with what is chosen now.
        least: seconds that a row takes at least.
    """

    def row(key: str, chosen: Mapping[str, str]) -> None:
        def chosen_and_measured() -> dict[str, Any]:
            with choices.using(chosen):
                return measure()

        record.measure(key, chosen_and_measured, least=least, most=30, choices=dict(chosen))

    row(AS_IT_IS, {})
    for operation, variant in others(choices):
        row(f"variants: {operation}, {variant}", {operation: variant})
    fastest = best(record.content["rows"])
    if fastest:
        row(TOGETHER, fastest)
    times = {one["key"]: one.get("milliseconds") for one in record.content["rows"]}
    if times.get(TOGETHER) and times[TOGETHER] < FASTER * times[AS_IT_IS]:
        choices.write(record.folder / "choices.json", choices.current() | fastest)
        record.facts(faster_choices=fastest)


def others(choices: Any) -> Iterator[tuple[str, str]]:
    """The variants that the table does not have."""
    current = choices.current()
    for operation, variants in choices.VARIANTS.items():
        for variant in variants:
            if variant != current[operation]:
                yield operation, variant


def best(rows: list[dict[str, Any]]) -> dict[str, str]:
    """By operation, the fastest variant, if it is faster than the table as it is and right."""
    times = {row["key"]: row.get("milliseconds") for row in rows}
    fastest: dict[str, str] = {}
    limits: dict[str, float] = {}
    for row in rows:
        taken, alone = row.get("milliseconds"), row.get("choices") or {}
        if not taken or len(alone) != 1 or not row.get("right") or not times.get(AS_IT_IS):
            continue
        ((operation, variant),) = alone.items()
        if taken < limits.get(operation, FASTER * times[AS_IT_IS]):
            fastest[operation], limits[operation] = variant, taken
    return fastest

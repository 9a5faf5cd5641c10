"""Files of adapters, which change a network's weights and are not networks: LoRA and its relatives.

A file is recognised by its names alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# what a name tells, in the order of precedence -> the kind of adapter, with its authors' name
_KINDS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        (
            "Control-LoRA",
            r"lora_controlnet|(?:input|middle)_blocks?\..+\.(?:up|down)",
        ),
        ("LoHa", r".+\.hada_(?:w[12]_[ab]|t[12]).*"),
        ("LoKr", r".+\.lokr_(?:w[12](?:_[ab])?|t2).*"),
        ("BOFT", r".+\.boft_.+"),
        ("OFT", r".+\.oft_(?:blocks|diag|R|r)\b.*"),
        ("DoRA", r".+\.(?:dora_scale|lora_magnitude_vector(?:\..+)?)"),
        ("(IA)3", r".+\.(?:on_input|ia3_l(?:\..+)?)"),
        ("GLoRA", r".+\.(?:[ab][12]|bm[12])\.weight"),
        ("VeRA", r".+\.vera_lambda_.+"),
        ("a weight that replaces another (set_weight)", r".+\.set_weight"),
        ("a weight of another shape (reshape_weight)", r".+\.reshape_weight"),
        ("a full weight difference", r".+\.diff(?:_b)?"),
        ("LyCORIS with trained norms", r".+\.[wb]_norm"),
        (
            "LoRA with biases",
            r".+\.(?:lora_(?:up|B)(?:\.\w+)?|lora\.up|lora_linear_layer\.up)\.bias",
        ),
    )
)
_LORA = re.compile(
    r".+(?:\.lora_(?:down|up|mid|A|B)(?:\.\w+)?|[._]lora\.(?:down|up)|\.lora_linear_layer\.(?:down|up))"
    r"\.weight"
)
# what makes LoRA's matrices mean something else
_IN_LORA = frozenset({"DoRA", "LoRA with biases", "LyCORIS with trained norms"})


def adapter_kinds(names: Iterable[str]) -> tuple[str, ...]:
    """The kinds of adapters among the names of a file, other than LoRA and LoCon, which
    ``sdconv.merge_lora`` merges; in the order of a table."""
    found = set()
    for name in names:
        kind = next((kind for kind, pattern in _KINDS if pattern.fullmatch(name)), None)
        if kind is not None:
            found.add(kind)
    return tuple(kind for kind, _ in _KINDS if kind in found)


def adapter_in(names: Iterable[str]) -> str | None:
    """The kind of adapter that a file is, ``LoRA`` included; None if it is not one.

    Two names of a whole checkpoint never look like an adapter's, but one might.
    """
    names = tuple(names)
    if any(".base_layer." in name for name in names):  # a network that still holds its adapter
        return None
    lora = sum(_LORA.fullmatch(name) is not None for name in names)
    kinds = adapter_kinds(names)
    if "Control-LoRA" in kinds:
        return "Control-LoRA"
    if lora >= 2:
        own = [kind for kind in kinds if kind in _IN_LORA]
        return own[0] if own else "LoRA"
    marked = sum(any(pattern.fullmatch(name) for _, pattern in _KINDS) for name in names)
    return kinds[0] if kinds and 3 * marked >= len(names) else None

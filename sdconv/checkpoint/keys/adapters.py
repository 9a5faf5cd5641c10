"""Files of adapters, which change a network's weights and are not networks: LoRA and its relatives.

A file is recognised by its names, and by the axes of OFT's blocks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

_Table = tuple[tuple[str, re.Pattern[str]], ...]

_LORA = re.compile(
    r".+(?:\.lora_(?:down|up|mid|A|B)(?:\.\w+)?|[._]lora\.(?:down|up)|\.lora_linear_layer\.(?:down|up))"
    r"\.weight"
)
_BLOCKS = re.compile(r".+\.oft_blocks")

# what a name tells, in the order of precedence -> the kind of adapter, with its authors' name
_MERGED: _Table = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("LoRA", _LORA.pattern),
        ("LoHa", r".+\.hada_(?:w[12]_[ab]|t[12]).*"),
        ("LoKr", r".+\.lokr_(?:w[12](?:_[ab])?|t2).*"),
        ("GLoRA", r".+\.(?:[ab][12]|bm)\.weight"),
        ("OFT", r".+\.(?:oft_blocks|oft_R(?:\..+)?)"),
        ("BOFT", r".+\.boft_[Rs](?:\..+)?"),
        ("(IA)3", r".+\.(?:on_input|ia3_l(?:\..+)?)"),
        ("DoRA", r".+\.(?:dora_scale|lora_magnitude_vector(?:\..+)?)"),
        ("weight-difference", r".+\.diff(?:_b)?"),
        ("norm", r".+\.[wb]_norm"),
        (
            "LoRA-bias",
            r".+\.(?:lora_(?:up|B)(?:\.\w+)?|lora\.up|lora_linear_layer\.up)\.bias",
        ),
    )
)
_REFUSED: _Table = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        (
            "Control-LoRA",
            r"lora_controlnet|(?:input|middle)_blocks?\..+\.(?:up|down)",
        ),
        ("OFT in its first form (oft_diag, oft_r)", r".+\.oft_(?:diag|r)\b.*"),
        ("T-LoRA", r".+\.(?:lambda_layer|[pq]_layer\.weight)"),
        ("AdaLoRA", r".+\.lora_E(?:\..+)?"),
        ("VeRA", r".+\.vera_lambda_.+"),
        ("a weight that replaces another (set_weight)", r".+\.set_weight"),
        ("a weight of another shape (reshape_weight)", r".+\.reshape_weight"),
    )
)


def refused_kinds(names: Iterable[str]) -> tuple[str, ...]:
    """The kinds of adapters among the names of a file that ``sdconv.merge_lora`` does not merge, in
    the order of a table."""
    return _kinds(_REFUSED, tuple(names))


def adapter_in(shapes: Mapping[str, Sequence[int]]) -> tuple[str, bool] | None:
    """The kind of adapter that a file is, such as ``LoRA and DoRA``, and whether
    ``sdconv.merge_lora`` merges it; None if it is not an adapter.

    Args:
        shapes: the shapes of the file's tensors. Two names of a whole checkpoint never look like an
            adapter's, but one might.
    """
    if any(".base_layer." in name for name in shapes):  # a network that still holds its adapter
        return None
    names = tuple(shapes)
    lora = sum(_LORA.fullmatch(name) is not None for name in names) >= 2
    refused = refused_kinds(names)
    if "Control-LoRA" in refused or (refused and (lora or _is_mostly(_REFUSED, names))):
        return refused[0], False
    kinds = list(_kinds(_MERGED, names))
    if not lora and not _is_mostly(_MERGED, names):
        return None
    if any(len(shape) == 4 for name, shape in shapes.items() if _BLOCKS.fullmatch(name)):
        kinds[kinds.index("OFT")] = "BOFT"
    return " and ".join(kinds), True


def _kinds(table: _Table, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(kind for kind, pattern in table if any(map(pattern.fullmatch, names)))


def _is_mostly(table: _Table, names: Sequence[str]) -> bool:
    """Whether at least a third of the names are in a table."""
    marked = sum(any(pattern.fullmatch(name) for _, pattern in table) for name in names)
    return 0 < marked >= len(names) / 3

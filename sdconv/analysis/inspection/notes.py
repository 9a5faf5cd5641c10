"""What tensors next to a network's weights say about how it is to be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sdconv.checkpoint.identify.infer import Identified
from sdconv.checkpoint.identify.shapes import BY_CALLER, BY_CONFIG
from sdconv.checkpoint.identify.statistics import statistics_in
from sdconv.checkpoint.open import SourceView
from sdconv.config import UNet2DConditionConfig
from sdconv.config.facts import EDM_STATISTICS

# marks whose presence alone counts (``model_type`` in ComfyUI's ``model_base.py``)
_MARKS: Mapping[str, str] = {
    "v_pred": "the U-Net predicts v (v-prediction)",
    "ztsnr": "the noise schedule ends at zero terminal SNR",
    "edm_vpred.sigma_max": "the U-Net predicts v on EDM's scale of noise",
}
# numbers that are shown with their values
_NUMBERS: Mapping[str, str] = {
    "edm_vpred.sigma_max": "the largest sigma",
    "edm_vpred.sigma_min": "the smallest sigma",
    "iteration": "training iterations",
    "global_step": "training steps",
    "epoch": "training epochs",
}


def notes_on(view: SourceView, networks: Sequence[Identified]) -> tuple[str, ...]:
    """What a source's marks and numbers mean, and what was assumed, one sentence each."""
    notes = [f"{name}: {meaning}" for name, meaning in _MARKS.items() if name in view.shapes]
    for name, meaning in _NUMBERS.items():
        if name in view.shapes and view.shapes[name] in ((), (1,)):
            number = float(view.tensor(name).reshape(()))
            notes.append(f"{name}: {meaning}, {number:g}")
    if statistics_in(view.shapes, view.source.metadata, view.tensor):
        said = " and ".join(EDM_STATISTICS)
        notes.append(f"{said}: the statistics by which latents are scaled (Playground v2.5)")
    if view.dequantised:
        notes.append(
            f"scaled fp8: {len(view.dequantised)} weights, which are multiplied by their scales "
            "when they are read"
        )
    notes += [
        "the U-Net's 8 attention heads are assumed, as SD1 has them: no shape shows them, and some "
        "networks without a mid block have 64 channels a head; a config.json next to the weights "
        "decides"
        for one in networks
        if _heads_are_assumed(one)
    ]
    return tuple(notes)


def _heads_are_assumed(one: Identified) -> bool:
    """Whether a U-Net was distilled from SD1 in a way (SDXS, tiny SD) that leaves the heads open,
    and neither a config nor the caller has said them."""
    return (
        isinstance(one.config, UNet2DConditionConfig)
        and one.config.mid_block_type is None
        and one.family == "sd1"
        and one.evidence not in (BY_CONFIG, BY_CALLER)
    )

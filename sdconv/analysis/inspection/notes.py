"""What tensors next to a network's weights say about how it is to be used."""

from __future__ import annotations

from collections.abc import Mapping

from sdconv.checkpoint.open import SourceView
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


def notes_on(view: SourceView) -> tuple[str, ...]:
    """What a source's marks and numbers mean, one sentence each."""
    notes = [f"{name}: {meaning}" for name, meaning in _MARKS.items() if name in view.shapes]
    for name, meaning in _NUMBERS.items():
        if name in view.shapes and view.shapes[name] in ((), (1,)):
            number = float(view.tensor(name).reshape(()))
            notes.append(f"{name}: {meaning}, {number:g}")
    if all(name in view.shapes for name in EDM_STATISTICS):
        said = " and ".join(EDM_STATISTICS)
        notes.append(f"{said}: the statistics by which latents are scaled (Playground v2.5)")
    if view.dequantised:
        notes.append(
            f"scaled fp8: {len(view.dequantised)} weights, which are multiplied by their scales "
            "when they are read"
        )
    return tuple(notes)

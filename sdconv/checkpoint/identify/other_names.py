"""Names in a checkpoint that are no weights of its networks: other parts, averages, marks, and
numbers of the noise schedule."""

from __future__ import annotations

import re

from sdconv.checkpoint.identify.detected import Shapes
from sdconv.checkpoint.identify.statistics import is_statistic

# under which part of a prefix running averages lie: `model_ema.`, `ema.`, `ema_model.`, `vae_ema.`
EMA_PART = re.compile(r"(?:^|(?<=\.))(?:\w+_)?ema(?:_\w+)?\.")
# how the names of a whole checkpoint's other parts begin
_OTHER_PARTS = (
    "cond_stage_model.",
    "conditioner.",
    "denoiser.",
    "embedder.",
    "first_stage_model.",
    "loss.",
    "model.diffusion_model.",
    "model_ema.",
    "text_encoder.",
    "text_encoder_2.",
    "text_encoders.",
    "unet.",
    "vae.",
)
# the noise schedule and the counters that Lightning stores with the weights
_SCHEDULE = re.compile(
    r"((sqrt|log)_)?((one_minus|recip|recipm1)_)?alphas_cumprod(_prev)?|betas|posterior_\w+"
    r"|logvar|scale_factor|global_step|lvlb_weights"
)
# schedules under names of their own
_EXTRAS = re.compile(r"edm_vpred\..+|(model_)?sampling\..+|denoiser\..+|sigmas?|timesteps")

# marks that say how a network is used, such as what a U-Net predicts
_MARKS = re.compile(r"v_pred|ztsnr|edm_vpred\..+|edm_mean|edm_std")


def is_mark(name: str) -> bool:
    """Whether a tensor's presence, or its value, says how a network is to be used."""
    return _MARKS.fullmatch(name) is not None


def is_of_another_part(name: str, shapes: Shapes) -> bool:
    """Whether a name without a prefix belongs to another part of a whole checkpoint, or says
    something about the training."""
    return (
        name.startswith(_OTHER_PARTS)
        or EMA_PART.match(name) is not None
        or bool(_SCHEDULE.fullmatch(name))
        or is_extra(name, tuple(shapes[name]))
    )


def is_extra(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor next to a network without a prefix is not a weight: a mark such as
    ``v_pred``, a counter such as ``iteration``, or a number of the noise schedule."""
    if name == "scaled_fp8":  # which belongs to the weights
        return False
    alone = "." not in name and len(shape) <= 1
    return alone or is_statistic(name) or bool(_EXTRAS.fullmatch(name))


def is_constant(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is no weight but a number of the noise schedule, a statistic or a mark."""
    return is_extra(name, shape) or bool(_SCHEDULE.fullmatch(name))

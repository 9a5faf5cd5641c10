"""Facts that no checkpoint contains, each with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# GroupNorm, in every network of the family: 32 groups (ldm/modules/diffusionmodules/model.py,
# `Normalize`).
NORM_NUM_GROUPS = 32
# eps of every GroupNorm in the VAE and of the transformers' input norm (the same function).
VAE_NORM_EPS = 1e-6
# eps of the U-Net's ResNet blocks and of its output norm (torch's default, `normalization` in ldm's
# util.py).
UNET_NORM_EPS = 1e-5

# Width of an embedded size or position in every known family of SDXL (`addition_time_embed_dim`),
# and the smallest number of them (the refiner's).
ADDED_TIME_DIM = 256
FEWEST_ADDED_TIMES = 5
# Width of unCLIP's image embedding, by CLIP L or H, plus an equally wide one of its noise level
# (`projection_class_embeddings_input_dim` in diffusers/stable-diffusion-2-1-unclip-i2i-l and
# stabilityai/stable-diffusion-2-1-unclip).
UNCLIP_WIDTHS = frozenset({2 * 768, 2 * 1024})

# The family that the width of the prompt embedding belongs to, by the text encoders of each:
# CLIP ViT-L (SD1), OpenCLIP ViT-H (SD2), OpenCLIP ViT-bigG (SDXL's refiner), and ViT-L next to
# ViT-bigG (SDXL); `cross_attention_dim` in their unet/config.json. The number of heads follows.
TEXT_WIDTHS: Mapping[int, str] = {768: "sd1", 1024: "sd2", 1280: "sdxl-refiner", 2048: "sdxl"}


def family_of_text(width: int, *, added: bool) -> str | None:
    """The family of a U-Net by the width of the prompt embedding that it reads, and by whether it
    has an added embedding, as SDXL has; None for one that no known model has.

    The refiner shares its width with latent diffusion's first text-to-image network
    (``cross_attention_dim`` in CompVis/ldm-text2im-large-256), which has no added embedding.
    """
    return TEXT_WIDTHS.get(width) if added or width != 1280 else None


# Rows and columns of pixels that one of a U-Net's latents stands for, in every family
# (`vae_scale_factor` in diffusers' pipelines).
PIXELS_PER_LATENT = 8

# The noise schedule of Stable Diffusion 1, 2 and XL: over these timesteps, the square root of beta
# rises linearly between the square roots of these two (`linear_start` and `linear_end` in their
# configs; `make_beta_schedule` in ldm's util.py).
TRAIN_TIMESTEPS = 1000
BETAS = (0.00085, 0.012)


@dataclass(frozen=True, kw_only=True)
class VaeFacts:
    """What a VAE's shapes do not show; ``source``: the model whose ``vae/config.json`` has it.

    ``latents_mean``, ``latents_std``: per channel; a diffusion model's input is
    ``(latents - latents_mean) * scaling_factor / latents_std``.
    """

    latent_channels: int
    scaling_factor: float
    shift_factor: float | None
    sample_size: int
    force_upcast: bool
    source: str
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None


# the names under which a single file of Playground v2.5 has the statistics of its latents
EDM_STATISTICS = ("edm_mean", "edm_std")

VAE_FACTS: Mapping[str, VaeFacts] = {
    "sd1": VaeFacts(
        latent_channels=4,
        scaling_factor=0.18215,
        shift_factor=None,
        sample_size=512,
        force_upcast=True,
        source="stable-diffusion-v1-5/stable-diffusion-v1-5",
    ),
    "sd2": VaeFacts(
        latent_channels=4,
        scaling_factor=0.18215,
        shift_factor=None,
        sample_size=768,
        force_upcast=True,
        source="stabilityai/stable-diffusion-2-1",
    ),
    "sdxl": VaeFacts(
        latent_channels=4,
        scaling_factor=0.13025,
        shift_factor=None,
        sample_size=1024,
        force_upcast=True,
        source="stabilityai/stable-diffusion-xl-base-1.0",
    ),
    "sdxl-refiner": VaeFacts(
        latent_channels=4,
        scaling_factor=0.13025,
        shift_factor=None,
        sample_size=1024,
        force_upcast=True,
        source="stabilityai/stable-diffusion-xl-refiner-1.0",
    ),
    # the weights are SDXL's
    "playground-v2.5": VaeFacts(
        latent_channels=4,
        scaling_factor=0.5,
        shift_factor=None,
        sample_size=1024,
        force_upcast=True,
        source="playgroundai/playground-v2.5-1024px-aesthetic",
        latents_mean=(-1.6574, 1.886, -1.383, 2.5155),
        latents_std=(8.4927, 5.9022, 6.5498, 5.2299),
    ),
    "x4-upscaler": VaeFacts(
        latent_channels=4,
        scaling_factor=0.08333,
        shift_factor=None,
        sample_size=256,
        force_upcast=True,
        source="stabilityai/stable-diffusion-x4-upscaler",
    ),
    "sd3": VaeFacts(
        latent_channels=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        sample_size=1024,
        force_upcast=True,
        source="stabilityai/stable-diffusion-3-medium-diffusers",
    ),
    "flux1": VaeFacts(
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        sample_size=1024,
        force_upcast=True,
        source="black-forest-labs/FLUX.1-schnell",
    ),
}

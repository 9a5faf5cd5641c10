"""Names networks that sdconv does not build, by names and shapes that only they have."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]

_AXES_OF_VIDEO = 5


@dataclass(frozen=True)
class _Sign:
    """A pattern for whole names, after any prefix; ``axes``: how many the tensor has, if that
    matters."""

    pattern: str
    axes: int | None = None


# In order: the first kind of which every sign is found. From the authors' and diffusers' classes.
_KINDS: tuple[tuple[str, tuple[_Sign, ...]], ...] = (
    (
        "the VAE of Wan or Qwen-Image, for videos",
        (_Sign(r"(encoder\.middle|decoder\.middle)\.0\.residual\.0\.gamma"),),
    ),
    (
        "the VAE of Wan or Qwen-Image, for videos",
        (_Sign(r"encoder\.conv_in\.weight", 5), _Sign(r"decoder\.mid_block\..+norm1\.gamma")),
    ),
    (
        "LTX-Video's VAE, for videos",
        (_Sign(r"(encoder\.|decoder\.)?per_channel_statistics\..+"),),
    ),
    (
        "LTX-Video's VAE, for videos",
        (_Sign(r"encoder\.conv_in\.conv\.weight", 5), _Sign(r"latents_(mean|std)")),
    ),
    (
        "CogVideoX's VAE, for videos",
        (_Sign(r"decoder\.(mid_block|mid)\..+\.conv_[by]\.conv\.(weight|bias)"),),
    ),
    ("Mochi's VAE, for videos", (_Sign(r"(blocks|layers)\.[0-9]+\..*stack\.[0-9]+\.weight"),)),
    ("Mochi's VAE, for videos", (_Sign(r"(encoder|decoder)\.block_(in|out)\.resnets\..+"),)),
    (
        "Cosmos's tokenizer, for videos",
        (_Sign(r"(encoder|decoder|quant_conv|post_quant_conv)\.(.+\.)?conv3d\.weight"),),
    ),
    (
        "Cosmos's tokenizer, for videos",
        (_Sign(r"(encoder|decoder)\.(un)?patcher(3d)?\..+"),),
    ),
    (
        "Cosmos's tokenizer, for videos",
        (_Sign(r"encoder\.conv_in\.conv_s\.weight", 5),),
    ),
    (
        "Stable Video Diffusion's VAE, whose decoder is for videos",
        (_Sign(r"decoder\..+\.(time_stack|time_mix_conv|temporal_res_block)\..+"),),
    ),
    (
        "Stable Video Diffusion's VAE, whose decoder is for videos",
        (_Sign(r"decoder\.(time_conv_out|conv_out\.time_mix_conv)\..+"),),
    ),
    ("Open-Sora's VAE, for videos", (_Sign(r"(.*\.)?(spatial_vae|temporal_vae)\..+"),)),
    (
        "a VQ model for videos, such as MAGVIT-v2",
        (_Sign(r"(encoder|decoder)\..+", _AXES_OF_VIDEO), _Sign(r"quantizers?\..+")),
    ),
    (
        "HunyuanVideo's VAE, for videos",
        (_Sign(r"(encoder|decoder)\..+\.conv1\.conv\.weight", 5),),
    ),
    (
        "HunyuanVideo's VAE, for videos",
        (_Sign(r"(encoder|decoder)\.conv_in\.conv\.weight", 5),),
    ),
    (
        "DC-AE, a deep-compression autoencoder",
        (_Sign(r"(encoder|decoder)\.(project_(in|out)|stages\.[0-9]+)\..+"),),
    ),
    (
        "DC-AE, a deep-compression autoencoder",
        (_Sign(r"(encoder\.down_blocks|decoder\.up_blocks)\.[0-9]+\.[0-9]+\.(conv1|attn)\..+"),),
    ),
    ("the consistency decoder", (_Sign(r"decoder_unet\..+"),)),
    (
        "the consistency decoder",
        (_Sign(r"embed_image\..+"), _Sign(r"(embed_time|down|up)\..+")),
    ),
    (
        "the asymmetric VAE (diffusers' AsymmetricAutoencoderKL)",
        (_Sign(r"decoder\.condition_encoder\..+"),),
    ),
    (
        "MoVQ, Kandinsky's VQ model",
        (
            _Sign(r"decoder\..+\.(norm_layer|conv_y|spatial_norm|group_norm)\b.*"),
            _Sign(r"quantize\.embedding\.weight"),
        ),
    ),
    ("a VQ model", (_Sign(r"quantize\.(embedding|embed).*"),)),
    (
        "Stable Cascade's stage A",
        (_Sign(r"(in_block|up_blocks|down_blocks)\..+"), _Sign(r"vquantizer\..+")),
    ),
    (
        "Stable Cascade's prior or decoder (stage C or B)",
        (_Sign(r"(clip_mapper|clip_txt_mapper|clip_txt_pooled_mapper|effnet_mapper).*\.weight"),),
    ),
    (
        "Stable Cascade's EfficientNet encoder",
        (_Sign(r"backbone\.0\.0\.weight"), _Sign(r"mapper\.0\.weight")),
    ),
    (
        "Stable Video Diffusion's U-Net",
        (_Sign(r"(.*\.)?[0-9]+\..*(temporal_res_block|temporal_transformer_blocks)\..+"),),
    ),
    ("Stable Video Diffusion's U-Net", (_Sign(r"(.*\.)?output_blocks\..+\.time_stack\..+"),)),
    ("AnimateDiff's layers over time, or a U-Net with them", (_Sign(r".*motion_modules\..+"),)),
    (
        "a U-Net for videos, with layers over time",
        (_Sign(r".*(temp_convs|temp_attentions)\.[0-9]+\..+"),),
    ),
    ("a ControlNet", (_Sign(r"(.*\.)?(controlnet_cond_embedding|input_hint_block)\..+"),)),
    ("a T2I-Adapter", (_Sign(r"adapter\.body\.[0-9]+\..+"),)),
    (
        "a VAE for videos, with convolutions over time",
        (_Sign(r"(encoder|decoder)\..+", _AXES_OF_VIDEO),),
    ),
    (
        "a VAE for videos, with convolutions over time",
        (_Sign(r"(quant_conv|post_quant_conv)\.weight", _AXES_OF_VIDEO),),
    ),
    (
        "the latent upscaler's U-Net, with K-diffusion's blocks",
        (_Sign(r"(down|up)_blocks\.[0-9]+\.resnets\.[0-9]+\.norm[12]\.linear\..+"),),
    ),
    ("an autoencoder for audio", (_Sign(r"(.*\.)?(encoder|decoder)\..+\.weight_v"),)),
    ("an IP-Adapter", (_Sign(r"(image_proj|ip_adapter)\..+"),)),
    ("FLUX.1's transformer", (_Sign(r"(.*\.)?double_blocks\.0\.img_attn\.qkv\.weight"),)),
    ("SD3's transformer", (_Sign(r"(.*\.)?joint_blocks\.0\.x_block\.attn\.qkv\.weight"),)),
    ("a safety checker", (_Sign(r"(.*\.)?concept_embeds"),)),
    (
        "a CLIP text encoder",
        (_Sign(r"(.*\.)?(embeddings\.)?token_embedding\.weight"),),
    ),
    ("a CLIP image encoder", (_Sign(r"(.*\.)?vision_model\.embeddings\..+"),)),
    ("a T5 text encoder", (_Sign(r"(.*\.)?block\.0\.layer\.0\.SelfAttention\.q\.weight"),)),
    ("a textual inversion embedding", (_Sign(r"emb_params|clip_[lg]|\*"),)),
    ("a hypernetwork", (_Sign(r"[0-9]{3,4}\.[01]\.linear.*\.weight"),)),
    (
        "an upscaler of images (ESRGAN)",
        (_Sign(r"body\.0\.rdb1\.conv1\.weight|model\.1\.sub\.0\.RDB1\.conv1\.0\.weight"),),
    ),
)
# names of modules that only other U-Nets have
_UNETS: tuple[tuple[str, str], ...] = (
    (
        r"(down|up)_blocks\.[0-9]+\.resnets\.[0-9]+\.norm[12]\.linear\..+",
        "the latent upscaler's U-Net, with K-diffusion's blocks",
    ),
    (r".+\.(add_k_proj|add_v_proj)\..+", "a U-Net of Kandinsky 2 or DeepFloyd IF"),
    (r"(position_net|.+\.fuser)\..+", "GLIGEN's U-Net, which also reads boxes"),
    (r".+\.(to_k_ip|to_v_ip)\..+", "a U-Net with an IP-Adapter in it"),
    (r"encoder_hid_proj\..+", "a U-Net that projects its prompt embedding first, as Kolors' does"),
    (
        r"(down_blocks|up_blocks|mid_block)\..*attentions\.[0-9]+\.(to_q|query|group_norm)\..+",
        "an unconditional U-Net (diffusers' UNet2DModel)",
    ),
    (
        r"(input_blocks|output_blocks|middle_block)\..*\.qkv\.weight",
        "an unconditional U-Net of the original code",
    ),
)
_COMPILED = tuple(
    (what, tuple((re.compile(sign.pattern), sign.axes) for sign in signs)) for what, signs in _KINDS
)
# a prefix that ends where one of these parts of a network begins
_ROOTS = re.compile(
    r"(?:^|\.)(?=(?:encoder|decoder|quant_conv|post_quant_conv|quantize|per_channel_statistics"
    r"|vquantizer|decoder_unet|down_blocks|up_blocks|in_block)\.)"
)


def other_unet(names: Iterable[str]) -> tuple[str, str] | None:
    """What a U-Net is that sdconv does not build, and the name that shows it; None if it is not
    recognised.

    Args:
        names: under its prefix, without the prefix.
    """
    for name in names:
        for pattern, what in _UNETS:
            if re.fullmatch(pattern, name):
                return what, name
    return None


def other_kind(shapes: Shapes, prefix: str = "") -> str | None:
    """What a network is that sdconv does not build; None if it is not recognised.

    Args:
        shapes: of a checkpoint's tensors.
        prefix: of the network's names.
    """
    if tiny_video(shapes, prefix):
        return "a tiny autoencoder for videos (TAEHV)"
    named = [
        (name.removeprefix(prefix), len(shape))
        for name, shape in shapes.items()
        if name.startswith(prefix)
    ]
    if not prefix:
        # also under whatever prefix the file has
        named += [
            (name[start:], axes)
            for name, axes in named
            if (match := _ROOTS.search(name)) and (start := match.end())
        ]
    for what, signs in _COMPILED:
        if all(
            any(axes in (None, count) and pattern.fullmatch(name) for name, count in named)
            for pattern, axes in signs
        ):
            return what
    return None


_NUMBERED = r"(?:(?:.*\.)?[a-z_]*(?:encoder|decoder)\.)?(?:layers\.)?[0-9]{1,4}"
_MEMORY_BLOCK = re.compile(rf"{_NUMBERED}\.conv\.0\.weight")
_TEMPORAL = re.compile(rf"{_NUMBERED}\.conv\.weight")


def tiny_video(shapes: Shapes, prefix: str = "") -> bool:
    """Whether the tensors are those of a tiny autoencoder for videos: its blocks read the frame
    before too, twice as many channels as they give. That remains where its layers over time have
    been removed."""
    for name, shape in shapes.items():
        if not name.startswith(prefix) or len(shape) != 4:
            continue
        if _TEMPORAL.fullmatch(name):
            return True
        if _MEMORY_BLOCK.fullmatch(name):
            # a block that changes the number of channels has a convolution around it
            skip = shapes.get(name.removesuffix("conv.0.weight") + "skip.weight", shape[:1] * 2)
            if len(skip) > 1 and shape[1] == 2 * skip[1]:
                return True
    return False

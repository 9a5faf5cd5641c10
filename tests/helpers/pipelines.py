"""Small diffusers pipelines with seeded weights; nothing is downloaded.

Text encoders are CLIP's classes with a vocabulary of single letters. The VAE's latents have an
eighth of the image's size, so that an image of 72x104 has latents of odd sizes.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

HEIGHT, WIDTH = 72, 104
TEXT_WIDTH = 32  # of the prompt embeddings


@dataclass(frozen=True)
class Run:
    """A pipeline's result: images, and the latents after each step."""

    images: Tensor
    latents: tuple[Tensor, ...] = field(default=())

    def __eq__(self, other: object) -> bool:
        """Whether two results are equal bit for bit."""
        if not isinstance(other, Run) or len(self.latents) != len(other.latents):
            return NotImplemented
        pairs = zip((self.images, *self.latents), (other.images, *other.latents), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> Any:
    """The module that ``make`` creates with random weights of a seed, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


def tokenizer() -> CLIPTokenizer:
    """A tokenizer with a token for each letter."""
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(vocabulary)},
        merges=[],
        model_max_length=77,
    )


def text_encoder(kind: type = CLIPTextModel, seed: int = 10) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer()),
        hidden_size=TEXT_WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=TEXT_WIDTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return seeded(lambda: kind(config), seed)


def vae(levels: int = 4, **fields: Any) -> Any:
    given = {
        "block_out_channels": (32, 32, 64, 64)[-levels:],
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "latent_channels": 4,
        "sample_size": 8 * 2**levels,
    }
    return _copy(diffusers.AutoencoderKL, given | fields, 20)


def unet(**fields: Any) -> Any:
    given = {
        "sample_size": 8,
        "block_out_channels": (32, 64, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": 8,
    }
    return _copy(diffusers.UNet2DConditionModel, given | fields, 30)


def _copy(kind: type, fields: dict[str, Any], seed: int) -> Any:
    """A network of its own; a copy takes less time than a new one."""
    return copy.deepcopy(_made(kind, pickle.dumps(fields), seed, torch.empty(0).device))


@lru_cache(maxsize=8)
def _made(kind: type, fields: bytes, seed: int, device: torch.device) -> Any:
    with device:
        return seeded(lambda: kind(**pickle.loads(fields)), seed)


def xl_unet(ids: int, text: int) -> Any:
    return unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 1, 1),
        cross_attention_dim=text,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 256 * ids,
    )


def _controlnet(of: Any) -> Any:
    net = seeded(lambda: diffusers.ControlNetModel.from_unet(of), 40)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(41)
        for out in (*net.controlnet_down_blocks, net.controlnet_mid_block):
            out.weight.normal_(std=0.2)  # initially zero, without any effect
    return net


SCHEDULERS = [
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
]


def scheduler(name: str = "DDIMScheduler") -> Any:
    """A scheduler of any of diffusers' classes with Stable Diffusion's settings."""
    kind = getattr(diffusers, name)
    fields = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "clip_sample": False,
        "skip_prk_steps": True,
    }
    taken = inspect.signature(kind.__init__).parameters
    return kind(**{field: value for field, value in fields.items() if field in taken})


def _plain(**parts: Any) -> dict[str, Any]:
    own = {
        "vae": vae(),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(),
        "unet": unet(),
        "scheduler": scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    return own | parts


def _controlled(parts: dict[str, Any]) -> dict[str, Any]:
    return parts | {"controlnet": _controlnet(parts["unet"])}


def _xl(**parts: Any) -> dict[str, Any]:
    own = {
        "vae": vae(scaling_factor=0.13025),
        "text_encoder": text_encoder(),
        "text_encoder_2": text_encoder(CLIPTextModelWithProjection, 11),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "scheduler": scheduler(),
        "add_watermarker": False,
    }
    return own | parts


def _base() -> dict[str, Any]:
    return _xl(unet=xl_unet(6, 2 * TEXT_WIDTH))


def _refiner() -> dict[str, Any]:
    none = {"text_encoder": None, "tokenizer": None}
    return _xl(unet=xl_unet(5, TEXT_WIDTH), **none, requires_aesthetics_score=True)


def _upscaler() -> dict[str, Any]:
    return {
        "vae": vae(3, scaling_factor=0.08333),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(),
        "unet": unet(
            in_channels=7,
            num_class_embeds=1000,
            only_cross_attention=(True, True, False),
            use_linear_projection=True,
        ),
        "low_res_scheduler": diffusers.DDPMScheduler(),
        "scheduler": scheduler(),
    }


def _image(height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(50))


def _mask() -> Tensor:
    mask = torch.zeros(2, 1, HEIGHT, WIDTH)
    mask[:, :, 16:48, 24:] = 1
    return mask


_SIZE = {"height": HEIGHT, "width": WIDTH}


@dataclass(frozen=True)
class Kind:
    """A pipeline's class, the family of its networks, its components, and the arguments of a call
    in addition to the prompts."""

    name: str
    family: str
    parts: Callable[[], dict[str, Any]]
    given: Callable[[], Mapping[str, Any]]


KINDS: Mapping[str, Kind] = {
    "text": Kind("StableDiffusionPipeline", "sd1", _plain, lambda: _SIZE),
    "image": Kind(
        "StableDiffusionImg2ImgPipeline",
        "sd1",
        _plain,
        lambda: {"image": _image(), "strength": 0.7},
    ),
    "inpaint": Kind(
        "StableDiffusionInpaintPipeline",
        "sd1",
        lambda: _plain(unet=unet(in_channels=9)),
        lambda: {"image": _image(), "mask_image": _mask(), "strength": 1.0, **_SIZE},
    ),
    "edit": Kind(
        "StableDiffusionInstructPix2PixPipeline",
        "sd1",
        lambda: _plain(unet=unet(in_channels=8)),
        lambda: {"image": _image()},
    ),
    "xl": Kind("StableDiffusionXLPipeline", "sdxl", _base, lambda: _SIZE),
    "refiner": Kind(
        "StableDiffusionXLImg2ImgPipeline",
        "sdxl-refiner",
        _refiner,
        lambda: {"image": _image(), "strength": 0.7},
    ),
    "upscale": Kind(
        "StableDiffusionUpscalePipeline",
        "x4-upscaler",
        _upscaler,
        lambda: {"image": _image(HEIGHT // 4, WIDTH // 4), "noise_level": 10},
    ),
    "controlnet": Kind(
        "StableDiffusionControlNetPipeline",
        "sd1",
        lambda: _controlled(_plain()),
        lambda: {"image": _image(), **_SIZE},
    ),
    "xl controlnet": Kind(
        "StableDiffusionXLControlNetPipeline",
        "sdxl",
        lambda: _controlled(_base()),
        lambda: {"image": _image(), **_SIZE},
    ),
}


def pipeline(kind: str, **parts: Any) -> Any:
    """A new pipeline of one of ``KINDS``, with some components replaced by ``parts``."""
    pipe = getattr(diffusers, KINDS[kind].name)(**KINDS[kind].parts() | parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, kind: str, **given: Any) -> Run:
    """Runs a pipeline on two prompts with seeds and guidance, for two steps (with ``strength``, for
    a part of three)."""
    latents: list[Tensor] = []
    given = {
        "prompt": ["a cat", "two dogs"],
        "negative_prompt": ["a mouse", ""],
        "guidance_scale": 5.0,
        "num_inference_steps": 3 if kind in ("image", "refiner") else 2,
        "generator": [torch.Generator().manual_seed(seed) for seed in (60, 61)],
        "output_type": "pt",
        **KINDS[kind].given(),
        **given,
    }

    def keep(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        latents.append(values["latents"].clone())
        return values

    if kind == "upscale":
        given["callback"] = lambda step, timestep, values: latents.append(values.clone())
    else:
        given["callback_on_step_end"] = keep
    images = pipe(**given).images
    return Run(images, tuple(latents))

"""Prompt embeddings for a U-Net: of a text, by the text encoders in a pipeline's folder; or from a
file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdconv.checkpoint.io.source import open_source
from sdconv.errors import InputError, SdconvError
from sdconv.models.unet import UNet2DConditionModel

_EMBEDS = ("prompt_embeds", "encoder_hidden_states", "embeds")
_POOLED = ("pooled_prompt_embeds", "text_embeds", "pooled")
_NEGATIVE = ("negative_prompt_embeds",)
_NEGATIVE_POOLED = ("negative_pooled_prompt_embeds",)
# what SDXL's refiner is conditioned on, in diffusers' pipeline
AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5


@dataclass(frozen=True, kw_only=True)
class PromptEmbeds:
    """What a U-Net takes of a prompt.

    Attributes:
        tokens: ``(1, tokens, width)``.
        pooled: ``(1, width)`` of the whole prompt, as SDXL takes it, or None.
        words: where they come from, for people.
        negative: the same of the negative prompt, for guidance; or None.
        aesthetic_score: what SDXL's refiner takes.
    """

    tokens: Tensor
    pooled: Tensor | None
    words: str
    negative: PromptEmbeds | None = None
    aesthetic_score: float = AESTHETIC_SCORE

    def checked(self, unet: UNet2DConditionModel, where: str) -> PromptEmbeds:
        """The same in the U-Net's dtype and on its device.

        Raises:
            InputError: the U-Net takes no prompt, or embeddings of other widths.
        """
        if not unet.reads_text:
            raise InputError("this U-Net takes no prompt", where=where)
        width = unet.config.context_dims[0]
        if self.tokens.shape[2] != width:
            raise InputError(
                "these prompt embeddings are not those of this U-Net",
                where=where,
                expected=f"(1, tokens, {width})",
                got=tuple(self.tokens.shape),
            )
        return replace(
            self,
            tokens=self.tokens.to(unet.device, unet.dtype),
            pooled=None if self.pooled is None else self.pooled.to(unet.device, unet.dtype),
            negative=None if self.negative is None else self.negative.checked(unet, where),
        )


@torch.inference_mode()
def encode_prompt(folder: Path, prompt: str, negative: str | None = None) -> PromptEmbeds:
    """The embeddings of a prompt and a negative prompt by a pipeline's own text encoders, in
    float32, as diffusers' pipelines of Stable Diffusion 1, 2 and XL compute them.

    Args:
        folder: of the pipeline, with ``tokenizer`` and ``text_encoder``, in SDXL also with
            ``tokenizer_2`` and ``text_encoder_2``.
        prompt, negative: the texts; what is beyond the tokenizer's length is left out. None is the
            empty text, and in SDXL zeros, if the pipeline's ``model_index.json`` does not say
            otherwise.

    Raises:
        InputError: the folder has no CLIP text encoder, or one that cannot be opened.
        SdconvError: transformers is not installed.
    """
    numbers = [
        number
        for number in ("", "_2")
        if all((folder / f"{part}{number}").is_dir() for part in ("tokenizer", "text_encoder"))
    ]
    if not numbers:
        raise InputError(
            "a prompt needs a pipeline's folder with its tokenizer and its text encoder",
            where=folder,
            expected="the folders tokenizer and text_encoder",
            hint="give --model a pipeline's folder, or the embeddings with --embeds FILE",
        )
    if (folder / "text_encoder_3").is_dir():
        raise InputError(
            "only the text encoders of Stable Diffusion 1, 2 and XL are used",
            where=folder,
            got="a third text encoder",
            hint="give the embeddings with --embeds FILE",
        )
    # SDXL, also with its second encoder only, takes the last but one layer
    deeper = "_2" in numbers
    empty_is_zeros = negative is None and deeper and _zeros_for_empty(folder)
    texts = [prompt] if empty_is_zeros else [prompt, negative or ""]
    parts: list[list[Tensor]] = [[] for _ in texts]
    pooled: list[Tensor | None] = [None for _ in texts]
    for number in numbers:
        for at, output in enumerate(_encoded(folder, number, texts)):
            parts[at].append(output.hidden_states[-2] if deeper else output.last_hidden_state)
            if number == "_2":
                pooled[at] = output.text_embeds
    embeds = [
        PromptEmbeds(tokens=torch.cat(part, -1), pooled=pool, words=_shortened(text))
        for part, pool, text in zip(parts, pooled, texts, strict=True)
    ]
    if empty_is_zeros:
        pool = pooled[0]
        embeds += [
            PromptEmbeds(
                tokens=torch.zeros_like(embeds[0].tokens),
                pooled=None if pool is None else torch.zeros_like(pool),
                words="zeros",
            )
        ]
    other = replace(embeds[1], aesthetic_score=NEGATIVE_AESTHETIC_SCORE)
    return replace(embeds[0], negative=other)


def _shortened(text: str) -> str:
    shown = text if len(text) <= 60 else f"{text[:59]}\u2026"
    return f"\u201c{shown}\u201d"


def _zeros_for_empty(folder: Path) -> bool:
    """Whether an SDXL pipeline takes zeros for a negative prompt that is not given."""
    try:
        index = json.loads((folder / "model_index.json").read_text("utf-8"))
        return bool(index.get("force_zeros_for_empty_prompt", True))
    except (OSError, ValueError, AttributeError):
        return True


def _encoded(folder: Path, number: str, texts: list[str]) -> list[Any]:
    """The outputs of one text encoder, text by text as in diffusers' pipelines."""
    try:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
    except ImportError as error:
        raise SdconvError(
            "encoding a prompt needs the transformers package",
            where="--prompt",
            hint="pip install 'sdconv[maps]', or give the embeddings with --embeds FILE",
        ) from error
    kind = CLIPTextModelWithProjection if number else CLIPTextModel
    path = folder / f"text_encoder{number}"
    try:
        tokenizer: Any = CLIPTokenizer.from_pretrained(
            folder / f"tokenizer{number}", local_files_only=True
        )
        encoder: Any = kind.from_pretrained(path, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(
            "the text encoder cannot be opened",
            where=path,
            expected="a CLIP text encoder, as save_pretrained writes it",
            got=(str(error).splitlines() or [type(error).__name__])[0],
        ) from error
    encoder = encoder.eval()
    tokens = tokenizer(
        texts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return [encoder(one[None], output_hidden_states=True) for one in tokens]


def read_embeds(path: Path) -> PromptEmbeds:
    """Prompt embeddings from a file of tensors.

    The embedding is the only tensor, or named ``prompt_embeds`` or ``encoder_hidden_states``:
    ``(1, tokens, width)`` or ``(tokens, width)``. A pooled one is named ``pooled_prompt_embeds`` or
    ``text_embeds``: ``(1, width)`` or ``(width,)``. Those of the negative prompt, for guidance, may
    be there as ``negative_prompt_embeds`` and ``negative_pooled_prompt_embeds``.

    Raises:
        CheckpointError: the file cannot be read.
        InputError: it is not clear which tensor is meant, or its shape or its values are not an
            embedding's.
    """
    with open_source(path) as source:
        shapes = {name: info.shape for name, info in source.entries.items()}
        name = _named(shapes, _EMBEDS) or (next(iter(shapes)) if len(shapes) == 1 else None)
        if name is None:
            raise InputError(
                "which tensor holds the prompt's embedding?",
                where=path,
                expected=f"one tensor, or one named {_EMBEDS[0]}",
                got=", ".join(list(shapes)[:8]) or "no tensors",
            )

        def of(names: tuple[str, ...], axes: int) -> Tensor | None:
            own = _named(shapes, names)
            return None if own is None else _batched(source.tensor(own), axes, f"{path}: {own}")

        found = PromptEmbeds(
            tokens=_batched(source.tensor(name), 3, f"{path}: {name}"),
            pooled=of(_POOLED, 2),
            words=path.name,
        )
        if (negative := of(_NEGATIVE, 3)) is None:
            return found
        if negative.shape != found.tokens.shape:
            raise InputError(
                "the negative prompt's embedding has another shape than the prompt's",
                where=f"{path}: {_NEGATIVE[0]}",
                expected=tuple(found.tokens.shape),
                got=tuple(negative.shape),
            )
        other = PromptEmbeds(
            tokens=negative,
            pooled=of(_NEGATIVE_POOLED, 2),
            words=path.name,
            aesthetic_score=NEGATIVE_AESTHETIC_SCORE,
        )
        return replace(found, negative=other)


def _named(shapes: Mapping[str, object], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in shapes), None)


def _batched(x: Tensor, axes: int, where: str) -> Tensor:
    """The first sample of an embedding, with an axis for the batch."""
    x = x[None] if x.ndim == axes - 1 else x
    if x.ndim != axes or not x.numel() or not x.is_floating_point():
        raise InputError(
            "not a prompt embedding",
            where=where,
            expected="floating-point numbers of shape "
            + ("(1, tokens, width)" if axes == 3 else "(1, width)"),
            got=f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}",
        )
    if not torch.isfinite(x).all():
        raise InputError("the embedding holds NaN or infinity", where=where)
    return x[:1].float()

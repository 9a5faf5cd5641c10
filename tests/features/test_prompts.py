"""Prompt embeddings are those of diffusers' pipelines, and fit the U-Net."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pipelines
from safetensors.torch import save_file

import sdconv
from sdconv.features.prompts import PromptEmbeds, encode_prompt, read_embeds

WORDS = "a cat and two dogs"


@torch.no_grad()
def theirs(kind: str) -> tuple[Any, ...]:
    pipe = pipelines.pipeline(kind)
    found: tuple[Any, ...] = pipe.encode_prompt(
        WORDS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return found


@pytest.mark.parametrize("kind", ["text", "xl", "refiner"])
def test_they_are_diffusers_bit_for_bit(kind: str, folders: dict[str, Path]) -> None:
    found, expected = encode_prompt(folders[kind], WORDS), theirs(kind)
    assert torch.equal(found.tokens, expected[0])
    assert not torch.equal(found.tokens, encode_prompt(folders[kind], "a mouse").tokens)
    if kind == "text":
        assert found.pooled is None
    else:
        assert found.pooled is not None and torch.equal(found.pooled, expected[2])
    assert WORDS in found.words


def test_what_a_folder_must_have(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(sdconv.InputError, match="needs a pipeline's folder"):
        encode_prompt(tmp_path, WORDS)
    for part in ("tokenizer", "text_encoder"):
        (tmp_path / part).mkdir()
    with pytest.raises(sdconv.InputError, match="cannot be opened"):
        encode_prompt(tmp_path, WORDS)
    (tmp_path / "text_encoder_3").mkdir()
    with pytest.raises(sdconv.InputError, match="--embeds FILE"):
        encode_prompt(tmp_path, WORDS)


def test_a_file_of_embeddings(tmp_path: Path) -> None:
    path = tmp_path / "prompt.safetensors"
    tokens, pooled = torch.randn(2, 7, 24), torch.randn(2, 16)
    save_file({"anything": tokens[0]}, path)
    assert torch.equal(read_embeds(path).tokens, tokens[:1])
    assert read_embeds(path).pooled is None
    save_file({"prompt_embeds": tokens.half(), "pooled_prompt_embeds": pooled}, path)
    found = read_embeds(path)
    assert torch.equal(found.tokens, tokens[:1].half().float())
    assert found.pooled is not None and torch.equal(found.pooled, pooled[:1])
    for tensors, words in (
        ({"a": tokens, "b": pooled}, "which tensor holds the prompt's embedding"),
        ({"prompt_embeds": pooled[0]}, "not a prompt embedding"),
        ({"prompt_embeds": tokens.long()}, "not a prompt embedding"),
        ({"prompt_embeds": tokens / 0}, "NaN or infinity"),
    ):
        save_file(tensors, path)
        with pytest.raises(sdconv.InputError, match=words):
            read_embeds(path)


def test_a_width_that_does_not_fit_the_unet() -> None:
    unet: Any = sdconv.load("weights/tiny-unet.safetensors")
    embeds = PromptEmbeds(tokens=torch.zeros(1, 3, 5), pooled=None, words="x")
    with pytest.raises(sdconv.InputError, match="not those of this U-Net"):
        embeds.checked(unet, "--embeds")
    fitting = PromptEmbeds(tokens=torch.zeros(1, 3, 4), pooled=None, words="x")
    assert fitting.checked(unet, "--embeds").tokens.dtype == unet.dtype

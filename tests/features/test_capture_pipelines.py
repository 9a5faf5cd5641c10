"""Around an ordinary call of a diffusers pipeline: calls, timesteps, halves of the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import pipelines
from torch import Tensor, nn

import sdconv
from sdconv.features import Context, Series

NAME = "unet.up_blocks.1.resnets.0"


def without_hooks(pipe: Any) -> bool:
    return not any(
        module._forward_hooks or module._forward_pre_hooks
        for part in pipe.components.values()
        if isinstance(part, nn.Module)
        for module in part.modules()
    )


@pytest.mark.parametrize("patched", [False, True])
def test_an_ordinary_call(patched: bool) -> None:
    pipe = pipelines.pipeline("text")
    if patched:
        sdconv.apply_patch(pipe)
    plain = pipelines.run(pipe, "text")
    with sdconv.capture(
        pipe, [NAME, "vae.decoder.mid_block", "text_encoder.*layers.0.mlp.fc1"]
    ) as maps:
        assert pipelines.run(pipe, "text") == plain
    series = maps[NAME]
    assert isinstance(series, Series)
    assert series.calls == (0, 1)
    assert series.timesteps == tuple(map(float, pipe.scheduler.timesteps)) == (501.0, 1.0)
    decoded = maps["vae.decoder.mid_block"]
    assert isinstance(decoded, Series)  # a sequence, even for one call
    assert (decoded.calls, decoded.timesteps) == ((0,), (None,))
    (texts,) = (maps.series(name) for name in maps if name.startswith("text_encoder."))
    assert texts.calls == (0, 1)  # the prompts and the negative prompts
    assert without_hooks(pipe)


def test_halves_are_those_of_the_prompts() -> None:
    pipe = pipelines.pipeline("text")
    with sdconv.capture(pipe, NAME) as maps:
        pipelines.run(pipe, "text", num_inference_steps=1, prompt=["a cat"] * 2)
    (entry,) = maps.series(NAME)
    assert entry.tensor.shape[0] == 4
    assert torch.equal(torch.cat([entry.unconditional, entry.conditional]), entry.tensor)
    # with the prompts exchanged, the halves are exchanged too
    with sdconv.capture(pipe, NAME) as swapped:
        pipelines.run(
            pipe,
            "text",
            num_inference_steps=1,
            prompt=["a mouse", ""],
            negative_prompt=["a cat"] * 2,
        )
    (other,) = swapped.series(NAME)
    torch.testing.assert_close(other.unconditional, entry.conditional)
    torch.testing.assert_close(other.conditional, entry.unconditional)
    assert not torch.allclose(entry.conditional, entry.unconditional)


def test_without_guidance_all_is_conditional() -> None:
    pipe = pipelines.pipeline("text")
    with sdconv.capture(pipe, NAME) as maps:
        pipelines.run(pipe, "text", guidance_scale=1.0, num_inference_steps=1)
    (entry,) = maps.series(NAME)
    assert torch.equal(entry.conditional, entry.tensor)
    with pytest.raises(sdconv.SdconvError, match="no unconditional half"):
        _ = entry.unconditional


def test_a_reduced_batch_has_no_halves() -> None:
    pipe = pipelines.pipeline("text")
    with sdconv.capture(pipe, NAME, reduce=lambda x: x.sum(0)) as maps:
        pipelines.run(pipe, "text", num_inference_steps=1)
    (entry,) = maps.series(NAME)
    with pytest.raises(sdconv.SdconvError, match="not known which half"):
        _ = entry.conditional


def test_guidance_that_ends_during_the_run() -> None:
    def end(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 0.0
        return {"prompt_embeds": given["prompt_embeds"].chunk(2)[-1]}

    pipe = pipelines.pipeline("text")
    options = {"callback_on_step_end": end, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with sdconv.capture(pipe, NAME) as maps:
        pipe("a cat", num_inference_steps=2, height=72, width=72, **options)
    both, alone = maps.series(NAME)
    assert (len(both.tensor), len(both.conditional), len(both.unconditional)) == (2, 1, 1)
    assert torch.equal(alone.conditional, alone.tensor)
    with pytest.raises(sdconv.SdconvError, match="no unconditional half"):
        _ = alone.unconditional


def test_a_call_with_one_half_has_no_halves() -> None:
    """As in pipelines that read cross-attention maps in a call without guidance first."""
    pipe = pipelines.pipeline("text")

    class Guides:
        do_classifier_free_guidance = True
        components = pipe.components

    x = torch.zeros(1, 4, 8, 8)
    with torch.no_grad(), sdconv.capture(Guides(), NAME) as maps:
        pipe.unet(x, 5, torch.zeros(1, 77, 32))
        pipe.unet(torch.cat([x, x]), 5, torch.zeros(2, 77, 32))
    first, second = maps.series(NAME)
    with pytest.raises(sdconv.SdconvError, match="not known which half"):
        _ = first.conditional
    assert len(second.conditional) == len(second.unconditional) == 1


def test_halves_that_are_not_known() -> None:
    pipe = pipelines.pipeline("upscale")  # does not say whether it guides
    with sdconv.capture(pipe, ["unet.mid_block", "vae.decoder.conv_in"]) as maps:
        pipelines.run(pipe, "upscale")
    for name in maps:
        with pytest.raises(sdconv.SdconvError, match="not known which half"):
            _ = maps.series(name)[0].conditional


@pytest.mark.parametrize(
    ("steps", "timesteps"),
    [([0], (501.0,)), (slice(1, None), (1.0,)), (lambda call: call.timestep < 100, (1.0,))],
)
def test_steps_select_calls_of_the_denoiser(steps: Any, timesteps: tuple[float, ...]) -> None:
    pipe = pipelines.pipeline("text")
    with sdconv.capture(pipe, [NAME, "vae.decoder.conv_in"], steps=steps) as maps:
        pipelines.run(pipe, "text")
    assert maps.series(NAME).timesteps == timesteps
    assert len(maps.series("vae.decoder.conv_in")) == 1


def test_stopping_a_pipeline() -> None:
    pipe = pipelines.pipeline("text")
    after: list[int] = []
    handle = pipe.vae.decoder.register_forward_pre_hook(lambda *_: after.append(1))
    with sdconv.capture(pipe, NAME, steps=[0], stop_early=True) as maps:
        pipelines.run(pipe, "text")
    found = sdconv.run_until(pipe, NAME, prompt="a cat", num_inference_steps=2, height=72, width=72)
    handle.remove()
    assert len(maps.series(NAME)) == len(found.series(NAME)) == 1
    assert after == []
    assert without_hooks(pipe)


def test_controlnet_and_image_pipelines() -> None:
    pipe = pipelines.pipeline("controlnet")
    with sdconv.capture(pipe, ["controlnet.mid_block", "unet.*:skip"]) as maps:
        pipelines.run(pipe, "controlnet")
    assert maps.series("controlnet.mid_block").timesteps == (501.0, 1.0)
    image = pipelines.pipeline("image")
    with sdconv.capture(image, ["vae.encoder.conv_out", "unet.conv_in"]) as maps:
        pipelines.run(image, "image")
    # images that each have a generator are encoded one by one
    assert maps.series("vae.encoder.conv_out").calls == (0, 1)
    assert maps.series("unet.conv_in").calls == (0, 1)


def test_an_edit_of_one_half() -> None:
    pipe = pipelines.pipeline("text")
    contexts: list[tuple[int, object]] = []

    def flip(x: Tensor, context: Context) -> Tensor:
        contexts.append((context.step, context.timestep))
        rows = context.conditional(len(x))
        new = x.clone()
        new[rows] = -x[rows]
        return new

    plain = pipelines.run(pipe, "text")
    with (
        sdconv.edit(pipe, {"unet.mid_block": flip}),
        sdconv.capture(pipe, "unet.mid_block") as maps,
    ):
        changed = pipelines.run(pipe, "text")
    assert changed != plain
    assert contexts == [(0, 501.0), (1, 1.0)]
    with sdconv.capture(pipe, "unet.mid_block") as before:
        assert pipelines.run(pipe, "text") == plain
    first, was = maps.series("unet.mid_block")[0], before.series("unet.mid_block")[0]
    assert torch.equal(first.conditional, -was.conditional)
    assert torch.equal(first.unconditional, was.unconditional)


def test_memory_for_all_steps_is_checked_before_the_first() -> None:
    pipe = pipelines.pipeline("text")
    with sdconv.capture(pipe, NAME) as maps:
        pipelines.run(pipe, "text")
    needed = sum(entry.tensor.nbytes for entry in maps.series(NAME))
    ran: list[int] = []
    handle = pipe.unet.conv_in.register_forward_hook(lambda *_: ran.append(1))
    with (
        pytest.raises(sdconv.SdconvError, match=f"{needed:,} bytes in all"),
        sdconv.capture(pipe, NAME, max_memory=needed - 1),
    ):
        pipelines.run(pipe, "text")
    handle.remove()
    assert ran == []
    # half of it is enough for one of the two steps
    with sdconv.capture(pipe, NAME, max_memory=needed // 2, steps=[1]) as maps:
        pipelines.run(pipe, "text")
    assert maps.series(NAME).timesteps == (1.0,)


def test_names_without_a_component() -> None:
    pipe = pipelines.pipeline("text")
    with (
        pytest.raises(sdconv.InputError, match=r"unet\.mid_block"),
        sdconv.capture(pipe, "mid_block"),
    ):
        pass
    assert without_hooks(pipe)

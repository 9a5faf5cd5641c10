"""diffusers' transformers with fused residuals and GEGLU: the same function whatever is on them."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import peft
import pytest
import torch
from diffusers.models import attention as diffusers_attention
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from helpers.numbers import error, randn
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import sdconv
from sdconv.fast import transformers as fast_transformers
from sdconv.fast.cpu import torch_kernels
from sdconv.fast.cpu import transformer as fast_transformer
from sdconv.fast.cpu.kernels import numba_kernels
from sdconv.fast.cpu.weight_cache import prompt_cache
from sdconv.integrations.diffusers import transformer
from sdconv.models.unet_blocks import TransformerSlot, run_transformer

pytest.importorskip("numba", reason="the compiled loops need numba: pip install sdconv[fast]")

WITHIN = 2e-6
CONTEXT = randn(2, 7, 24, seed=1)
# 272 tokens: enough for the compiled kernels
X = randn(2, 64, 16, 17, seed=2)


def made(linear: bool = False, only_cross: bool = False, depth: int = 2) -> Any:
    torch.manual_seed(0)
    slot = TransformerSlot(
        name="attentions.0",
        channels=64,
        heads=4,
        depth=depth,
        cross_attention_dim=24,
        use_linear_projection=linear,
        only_cross_attention=only_cross,
        upcast_attention=False,
        norm_num_groups=8,
    )
    return transformer(slot).eval()


def run(module: nn.Module, backend: str, x: Tensor = X, **more: Any) -> Tensor:
    context = CONTEXT.to(x.dtype)
    with torch.no_grad(), sdconv.backend(backend):
        return run_transformer(module, x, {"encoder_hidden_states": context, **more})


def exact(module: nn.Module) -> Tensor:
    return run(copy.deepcopy(module).double(), "reference", X.double())


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The fused kernels that are called, in order."""
    calls: list[str] = []
    kernels = numba_kernels()[0]
    linear, geglu = kernels.linear, kernels.geglu

    def seen_linear(x: Tensor, weight: Tensor, bias: Any, residual: Any = None) -> Any:
        calls.extend(["residual"] * (residual is not None))
        return linear(x, weight, bias, residual)

    def seen_geglu(x: Tensor, weight: Tensor, bias: Any) -> Any:
        calls.append("geglu")
        return geglu(x, weight, bias)

    monkeypatch.setattr(kernels, "linear", seen_linear)
    monkeypatch.setattr(kernels, "geglu", seen_geglu)
    yield calls


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("only_cross", [False, True])
def test_plain_transformers(
    linear: bool, only_cross: bool, layout: torch.memory_format, fused: list[str]
) -> None:
    module = made(linear, only_cross)
    expected = exact(module)
    out = run(module, "fast", X.contiguous(memory_format=layout))
    assert fused == ["residual", "residual", "geglu", "residual"] * 2 + ["residual"]
    assert error(out, expected) < WITHIN
    assert out.is_contiguous(memory_format=torch.channels_last)
    # controls: without the input as the last residual, and with another prompt
    assert error(out - X, expected) > 0.1
    other = run(module, "fast", X, encoder_hidden_states=CONTEXT.roll(1, 2))
    assert error(other, expected) > 100 * WITHIN


@pytest.mark.parametrize("change", ["prompt", "weight", "other prompt"])
def test_keys_and_values_of_a_prompt_are_computed_once(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, prompt, computed = made(), CONTEXT.clone(), 0
    right = functional.linear

    def counted(x: Tensor, *others: Any) -> Tensor:
        nonlocal computed
        computed += x.shape == prompt.shape
        return right(x, *others)

    monkeypatch.setattr(functional, "linear", counted)
    prompt_cache.clear()
    out = run(module, "fast", encoder_hidden_states=prompt)
    assert computed == 4
    # keys and values of two blocks
    assert prompt_cache.memory == 4 * CONTEXT[..., 0].numel() * 64 * 4
    assert torch.equal(run(module, "fast", encoder_hidden_states=prompt), out)
    assert computed == 4
    if change == "prompt":
        prompt.data[0, 0, 0] += 9
    elif change == "weight":
        module.transformer_blocks[1].attn2.to_v.weight.data[0] += 9
    else:
        prompt = CONTEXT.roll(1, 2)
    changed = run(module, "fast", encoder_hidden_states=prompt)
    assert computed == (5 if change == "weight" else 8)
    wide = run(
        copy.deepcopy(module).double(),
        "reference",
        X.double(),
        encoder_hidden_states=prompt.double(),
    )
    assert error(changed, wide) < WITHIN
    assert error(changed, out) > 1e-4
    del module
    gc.collect()
    assert prompt_cache.memory == 0


def names_of(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if not isinstance(part, nn.ModuleList)]


@pytest.mark.parametrize("name", names_of(made(depth=1)))
def test_a_hook_on_any_part_sees_and_changes_what_it_does_in_the_reference(name: str) -> None:
    module = made(depth=1)
    plain = run(module, "reference")
    run(module, "fast")  # keeps the prompt's keys and values
    seen: list[tuple[Any, ...]] = []

    def double(part: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
        first = out[0] if isinstance(out, tuple) else out
        seen.append((sorted(kwargs), *(one.clone() for one in (*tensors, first))))
        return (2 * first,) if isinstance(out, tuple) else 2 * first

    module.get_submodule(name).register_forward_hook(double, with_kwargs=True)
    expected, out = run(module, "reference"), run(module, "fast")
    assert len(seen) == 2
    assert seen[0][0] == seen[1][0]
    for theirs, ours in zip(seen[0][1:], seen[1][1:], strict=True):
        assert error(ours, theirs) < 10 * WITHIN
    assert error(out, expected) < 10 * WITHIN
    assert error(expected, plain) > 1e-3


def lora(module: Any) -> None:
    layers = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "proj_out"]
    config = peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False)
    peft.inject_adapter_in_model(config, module)


def own_forward(module: Any) -> None:
    part = module.transformer_blocks[0].ff
    plain = part.forward
    part.forward = MethodType(lambda self, *args, **kwargs: 3 * plain(*args, **kwargs), part)


def processor(module: Any) -> None:
    class Tripled(AttnProcessor2_0):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return 3 * super().__call__(*args, **kwargs)

    module.transformer_blocks[0].attn1.set_processor(Tripled())


def subclass(module: Any) -> None:
    class Tripled(diffusers_attention.BasicTransformerBlock):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return 3 * super().forward(*args, **kwargs)

    module.transformer_blocks[1].__class__ = Tripled


def chunked(module: Any) -> None:
    module.transformer_blocks[0].set_chunk_feed_forward(16, dim=1)


def residual_connection(module: Any) -> None:
    attention = module.transformer_blocks[0].attn2
    attention.residual_connection, attention.rescale_output_factor = True, 1.5


CHANGES: dict[str, Callable[[Any], None]] = {
    "LoRA layers": lora,
    "a forward of its own": own_forward,
    "a processor of its own": processor,
    "an unfused processor": lambda m: m.transformer_blocks[0].attn2.set_processor(AttnProcessor()),
    "a subclass": subclass,
    "a chunked feed-forward": chunked,
    "a residual inside the attention": residual_connection,
    "weights changed in place": lambda m: m.transformer_blocks[0].ff.net[2].weight.data.mul_(1.5),
    "a bias in the projection": lambda m: m.proj_out.bias.data.add_(1.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_transformers(change: str) -> None:
    module = made()
    before = run(module, "fast")
    CHANGES[change](module)
    expected = run(module, "reference")
    assert error(run(module, "fast"), expected) < 10 * WITHIN
    if change not in ("a chunked feed-forward", "an unfused processor"):
        assert error(before, expected) > 1e-3


def test_a_replaced_method_of_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    module = made()
    before = run(module, "fast")
    for kind in (AttnProcessor2_0, diffusers_attention.FeedForward):
        name = "__call__" if kind is AttnProcessor2_0 else "forward"
        plain = getattr(kind, name)
        with monkeypatch.context() as patch:
            patch.setattr(kind, name, lambda *args, plain=plain, **kw: 3 * plain(*args, **kw))
            expected = run(module, "reference")
            assert error(run(module, "fast"), expected) < 10 * WITHIN
        assert error(before, expected) > 1e-2


def test_dropout_in_training(fused: list[str]) -> None:
    module = made().train()
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.5
    torch.manual_seed(1)
    expected = run(module, "reference")
    torch.manual_seed(1)
    assert error(run(module, "fast"), expected) < 10 * WITHIN
    assert fused == ["residual"]  # that of the last projection


def test_masks_reach_the_attention(fused: list[str]) -> None:
    module = made()
    mask = torch.where(torch.arange(7) < 4, 0.0, -10000.0).expand(2, 1, 7)
    expected = run(module, "reference", encoder_attention_mask=mask)
    assert error(run(module, "fast", encoder_attention_mask=mask), expected) < 10 * WITHIN
    assert error(run(module, "fast"), expected) > 1e-4
    assert "geglu" in fused  # control: of the call without a mask


def test_gradients_are_the_references() -> None:
    module = made()
    grads = []
    for backend in ("reference", "fast"):
        x = X.clone().requires_grad_()
        with sdconv.backend(backend):
            run_transformer(module, x, {"encoder_hidden_states": CONTEXT}).square().sum().backward()
        assert x.grad is not None
        grads.append(x.grad)
    assert error(grads[1], grads[0]) < 1e-4
    assert error(grads[1].roll(1, 1), grads[0]) > 0.1


def test_without_compiled_kernels(monkeypatch: pytest.MonkeyPatch, fused: list[str]) -> None:
    for user in (fast_transformer, fast_transformers):
        monkeypatch.setattr(user, "kernels_for", lambda dtype: torch_kernels)
    module = made()
    assert error(run(module, "fast"), exact(module)) < WITHIN
    assert fused == []


def test_a_default_device(fused: list[str]) -> None:
    module = made()
    with torch.device("cpu"):
        out = run(module, "fast")
    assert "geglu" in fused
    assert error(out, exact(module)) < WITHIN


def test_a_callers_mode_sees_the_functions_that_diffusers_calls() -> None:
    module, seen = made(), []

    class Mode(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Mode():
        out = run(module, "fast")
    assert functional.gelu in seen
    assert error(out, exact(module)) < WITHIN

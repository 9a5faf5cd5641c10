"""The processor's features, and what they change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.numbers import error, randn

from sdconv.fast.cpu import conv, processor
from sdconv.fast.cpu.conv import Epilogue, conv3x3, plan_for, winograd_conv


def test_rates() -> None:
    amx, avx = frozenset({"amx_bf16", "avx512_bf16"}), frozenset({"avx512_bf16"})
    assert processor.direct_rate(torch.bfloat16, amx) > processor.direct_rate(torch.bfloat16, avx)
    assert processor.direct_rate(torch.bfloat16, avx) > 1
    none: frozenset[str] = frozenset()
    for dtype, found in ((torch.bfloat16, none), (torch.float16, amx)):
        assert processor.direct_rate(dtype, found) < 1
    assert processor.direct_rate(torch.float32, amx) == 1


def test_features_are_those_that_torch_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, question in processor._QUESTIONS.items():
        for answer in (True, False):
            monkeypatch.setattr(torch.cpu, question, lambda answer=answer: answer, raising=False)
            processor.features.cache_clear()
            assert (name in processor.features()) == answer
        monkeypatch.delattr(torch.cpu, question)
        processor.features.cache_clear()
        assert name not in processor.features()
    processor.features.cache_clear()


@pytest.fixture
def forget() -> Iterator[None]:
    """Nothing is remembered of another processor."""
    processor.direct_rate.cache_clear()
    yield
    processor.direct_rate.cache_clear()


@pytest.mark.slow
@pytest.mark.usefixtures("forget")
@pytest.mark.parametrize("found", [frozenset(), frozenset({"amx_bf16"})], ids=["none", "AMX"])
def test_a_plan_follows_the_processor(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between float32 and torch's own kernel: where matrix units cannot be used directly."""
    monkeypatch.setattr(processor, "features", lambda: found)
    monkeypatch.setattr(conv, "methods_for", lambda dtype: ("winograd",))
    x, weight = randn(1, 128, 64, 64).bfloat16(), randn(128, 128, 3, 3, seed=1).bfloat16()
    method = plan_for("conv3x3", x, weight, False).method
    assert method == ("direct" if found else "winograd")
    assert plan_for("conv3x3", x.float(), weight.float(), False).method == "winograd"
    ran = []
    monkeypatch.setattr(conv, "winograd_conv", lambda *args: ran.append(args) or _plain(*args))
    out, _ = conv3x3(x, weight, None, Epilogue(), groups=1)
    assert bool(ran) is not bool(found)
    exact = conv.direct_conv(x.double(), weight.double(), None, Epilogue())
    assert error(out, exact) < 2e-2


_plain = winograd_conv

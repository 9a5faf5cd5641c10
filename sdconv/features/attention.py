"""The attention probabilities of a U-Net's transformers, which fused kernels never write down."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sdconv.errors import SdconvError
from sdconv.features.forwards import ReplacedForward

Visit = Callable[[Tensor], Tensor | None]
"""Called with a feature map; a tensor that it returns replaces the feature map."""

PROBABILITIES = ":probs"
"""The end of the names of hook points at which probabilities can be read."""

_SOFTMAX = (Tensor.softmax, torch.softmax, functional.softmax)


def has_probabilities(name: str, module: nn.Module) -> bool:
    """Whether a module is the self-attention or the cross-attention of a U-Net's transformer.

    Args:
        name: of the module.
        module: sdconv's U-Net has diffusers' attention, as diffusers' own has.
    """
    in_transformer = name.rpartition(".")[2] in ("attn1", "attn2")
    return in_transformer and type(module).__name__ == "Attention" and hasattr(module, "heads")


class ProbabilityHandle:
    """Calls ``visit`` with the probabilities ``(B, heads, queries, keys)`` of each call of an
    attention, until it is removed.

    They are computed in addition to the attention, whose result keeps its bits unless ``visit``
    returns other probabilities. Where an IP adapter attends to an image too, they are those of the
    prompt. Several visits of one module are called in the order in which they came.
    """

    def __init__(self, module: nn.Module, name: str, visit: Visit) -> None:
        self._reader = _reader_of(module) or _Reader(module, name)
        self._reader.visits[self] = visit

    def remove(self) -> None:
        self._reader.visits.pop(self, None)
        if not self._reader.visits:
            self._reader.remove()


def _reader_of(module: nn.Module) -> _Reader | None:
    """The reader among the replacements of a module's ``forward``."""
    forward = vars(module).get("forward")
    while isinstance(forward, ReplacedForward) and not isinstance(forward, _Reader):
        forward = forward.own
    return forward if isinstance(forward, _Reader) else None


class _Reader(ReplacedForward):
    """Runs an attention under ``_Probabilities``."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module)
        self._name = name
        self.visits: dict[ProbabilityHandle, Visit] = {}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        processor = type(getattr(self.module, "processor", None)).__name__
        if "Sliced" in processor:
            raise self._unreadable(processor, "disable_attention_slicing() of the pipeline")
        with (mode := _Probabilities(int(self.module.heads), self._visited)):  # type: ignore[arg-type]
            output = self.original(*args, **kwargs)
        if not mode.visited:
            raise self._unreadable(processor, "set_default_attn_processor() of the U-Net")
        return output

    def _visited(self, x: Tensor) -> Tensor:
        for visit in tuple(self.visits.values()):
            new = visit(x)
            x = x if new is None else new
        return x

    def _unreadable(self, processor: str, method: str) -> SdconvError:
        return SdconvError(
            "this layer's attention probabilities cannot be read",
            where=self._name,
            expected="an attention processor that computes whole probabilities, or calls "
            "torch's scaled_dot_product_attention",
            got=processor,
            hint=f"call {method} before the block",
        )


class _Probabilities(TorchFunctionMode):
    """Intercepts the first attention that is computed in a block."""

    def __init__(self, heads: int, visit: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._heads, self._visit = heads, visit
        self.visited = False

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not self.visited and function is functional.scaled_dot_product_attention:
            return self._fused(*args, **kwargs)
        output = function(*args, **kwargs)
        # (B * heads, queries, keys)
        if not self.visited and function in _SOFTMAX and output.ndim == 3:
            self.visited = True
            found = output.unflatten(0, (-1, self._heads))
            new = self._visit(found)
            return output if new is found else new.flatten(0, 1)
        return output

    def _fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if not (dropout_p or is_causal or enable_gqa):  # a U-Net's attention has none of them
            self.visited = True
            found = probabilities(query, key, attn_mask, scale)
            new = self._visit(found)
            if new is not found:
                return new.to(value.dtype) @ value
        options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, **options
        )


def probabilities(
    query: Tensor, key: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The softmax of scaled products, computed in float32 or wider.

    Args:
        query: ``(B, heads, queries, channels)``.
        key: ``(B, heads, keys, channels)``.
        mask: added to the products; or booleans, of which False leaves a key out.
        scale: of the products; None for ``channels ** -0.5``.

    Returns:
        ``(B, heads, queries, keys)`` in the dtype of ``query``; each row sums to 1.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query.to(wide) @ key.to(wide).mT) * factor
    if mask is not None:
        excluded = mask.dtype is torch.bool
        scores = scores.masked_fill(~mask, float("-inf")) if excluded else scores + mask
    return scores.softmax(-1).to(query.dtype)

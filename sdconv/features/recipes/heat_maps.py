"""Heat maps for words: where in an image a U-Net attends to a word of its prompt (DAAM; Tang et al.
2022, https://arxiv.org/abs/2210.04885)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from sdconv.errors import InputError, SdconvError
from sdconv.features.calls import CallCounter
from sdconv.features.hooks import attach, first_tensor, uncompiled, untraced
from sdconv.features.rendering import grid_of
from sdconv.features.selection import Steps, select_calls
from sdconv.features.targets import target_of, unet_of


class HeatMaps:
    """How much each position of the latents attends to each token, over layers, heads and steps.

    Args:
        tokens: finds the positions of a word's tokens; None if only numbers of tokens are known.
    """

    def __init__(self, tokens: Callable[[str], Sequence[int]] | None) -> None:
        self._tokens = tokens
        self._sum: Tensor | None = None
        self._count = 0
        self._lock = threading.Lock()

    @property
    def tensor(self) -> Tensor:
        """``(B, tokens, h, w)`` in float32: the mean attention probability of each token at each
        position of the latents. Over the tokens it sums to about 1, since upsampling rounds.

        Raises:
            SdconvError: no cross-attention has been computed.
        """
        if self._sum is None:
            raise SdconvError(
                "no cross-attention was computed",
                where="heat maps",
                expected="a call of the network inside the block, in a selected step",
            )
        return self._sum / self._count

    def __getitem__(self, word: str | int | Sequence[int]) -> Tensor:
        """The heat map of a word, ``(B, h, w)``: the mean over its tokens.

        Args:
            word: a word or several of the prompt; or numbers of tokens, from 0 for the begin token.

        Raises:
            InputError: the prompt does not contain the word, or has no such token.
            SdconvError: no cross-attention has been computed.
        """
        found = self.tensor
        if isinstance(word, str):
            if self._tokens is None:
                raise InputError(
                    "the prompt's tokens are not known",
                    where=repr(word),
                    expected="the number of a token",
                    hint="give heat_maps a pipeline and its prompt",
                )
            numbers = list(self._tokens(word))
        else:
            numbers = [word] if isinstance(word, int) else list(word)
        if not numbers or not all(0 <= number < found.shape[1] for number in numbers):
            raise InputError(
                "the prompt has no such token",
                where=repr(word),
                expected=f"0 to {found.shape[1] - 1}",
                got=numbers,
            )
        return found[:, numbers].mean(1)

    def add(self, probabilities: Tensor, size: tuple[int, int]) -> None:
        """Add the attention of one layer in one call.

        Args:
            probabilities: ``(B, heads, queries, tokens)``.
            size: rows and columns of the latents.
        """
        mean = probabilities.detach().float().mean(1)
        grid = grid_of(mean.shape[1], size)
        if grid is None:
            raise SdconvError(
                "these positions are not those of a level of the U-Net",
                where="heat maps",
                expected=f"latents of {size[0]} x {size[1]}, halved some times",
                got=f"{mean.shape[1]} positions",
            )
        layer = mean.mT.reshape(*mean.mT.shape[:2], *grid)
        layer = nn.functional.interpolate(layer, size, mode="bicubic").clamp(min=0)
        with self._lock:
            if self._sum is not None and self._sum.shape != layer.shape:
                raise SdconvError(
                    "heat maps of images of different sizes or numbers cannot be added",
                    where="heat maps",
                    expected=tuple(self._sum.shape),
                    got=tuple(layer.shape),
                    hint="open a block for each run",
                )
            self._sum = layer if self._sum is None else self._sum + layer
            self._count += 1


@untraced
@contextmanager
def heat_maps(target: Any, prompt: str | None = None, *, steps: Steps = None) -> Iterator[HeatMaps]:
    """Sum the cross-attention of a U-Net while the block lasts. The results do not change.

    Under guidance, only the half of the batch that follows the prompt counts. Each layer's
    probabilities are added at once, so that memory does not grow with the number of steps.

    Args:
        target: a pipeline, or a U-Net, sdconv's or diffusers'.
        prompt: the text of the pipeline's call, so that words can be asked for; None if numbers of
            tokens are enough.
        steps: the calls to count, as for ``sdconv.capture``.

    Yields:
        The heat maps, readable inside the block and after it.

    Raises:
        InputError: the target has no U-Net with cross-attention, or no tokenizer for a prompt.
    """
    prefix, network = unet_of(target)
    found = target_of(target)
    points = {
        name: point for name, point in found.hook_points().items() if name.endswith("attn2:probs")
    }
    if not points:
        raise InputError(
            "this network has no cross-attention",
            where="target",
            expected="a U-Net with transformers",
            got=type(network).__name__,
        )
    counter = found.counters()[prefix]
    selected, _ = select_calls(steps)
    maps = HeatMaps(None if prompt is None else _finder(target, prompt))
    sizes = threading.local()

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = first_tensor((args, kwargs))
        sizes.now = None if sample is None else (sample.shape[2], sample.shape[3])

    def visit(name: str) -> Callable[[Tensor], None]:
        def add(probabilities: Tensor) -> None:
            call = counter.current(name)
            if selected(call):
                maps.add(probabilities[_rows(counter, name, len(probabilities))], sizes.now)

        return add

    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        stack.callback(counter.attach().remove)
        handle = network.register_forward_pre_hook(begin, with_kwargs=True)
        stack.callback(handle.remove)
        for name, point in points.items():
            stack.callback(attach(point, visit(name)).remove)
        yield maps


def _rows(counter: CallCounter, name: str, batch: int) -> slice:
    """The rows of a batch that follow the prompt; all rows if that is not known."""
    call = counter.current(name)
    return call.rows("conditional", batch) if call.guided else slice(None)


def _finder(target: Any, prompt: str) -> Callable[[str], Sequence[int]]:
    """A function that finds the positions of a word's tokens in a prompt's."""
    tokenizer = getattr(target, "tokenizer", None) or getattr(target, "tokenizer_2", None)
    if tokenizer is None:
        raise InputError(
            "there is no tokenizer that knows the prompt's tokens",
            where="prompt",
            expected="a pipeline with a tokenizer",
            got=type(target).__name__,
            hint="leave the prompt out, and ask for numbers of tokens",
        )
    length = getattr(tokenizer, "model_max_length", None)
    tokens = tokenizer(prompt, max_length=length, truncation=True).input_ids

    def find(word: str) -> Sequence[int]:
        own = tokenizer(word, add_special_tokens=False).input_ids
        starts = range(len(tokens) - len(own) + 1) if own else ()
        found = [at for at in starts if list(tokens[at : at + len(own)]) == list(own)]
        if not found:
            raise InputError(
                "the prompt does not contain this word",
                where=repr(word),
                expected=f"a word of {prompt!r}",
            )
        return [start + at for start in found for at in range(len(own))]

    return find

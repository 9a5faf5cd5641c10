"""The protocol of the fast backend's CPU kernels, and the choice between Numba's and torch's."""

from __future__ import annotations

import time
import warnings
from functools import cache
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from sdconv.errors import SdconvWarning
from sdconv.fast.cpu import torch_kernels
from sdconv.fast.cpu.processor import ProcessorError, has_amx_kernels
from sdconv.fast.cpu.tiling import MULTIPLE, Bands, Strip, part_channels
from sdconv.fast.cpu.winograd import Scheme

Affine = tuple[Tensor, Tensor]


class Kernels(Protocol):
    """What a module of kernels provides. Rows are ``(rows, W, C)``, in float32, bfloat16 or
    float16, and so are weights; sums are float64, all else is float32."""

    def input_transform(
        self,
        strip: Strip,
        rows: Tensor,
        row: int,
        above: Tensor | None,
        affine: Affine | None,
        silu: bool,
        tiles: Tensor,
    ) -> None:
        """Normalises a strip's input rows and transforms them into ``tiles``
        ``(blocks, positions, T, C / blocks)``, whose rows are contiguous and next to each other.
        With several blocks of channels, each has a multiple of `MULTIPLE`.

        Args:
            rows: the input's rows, from row number ``row`` on.
            above: if given, replaces the row before the strip; in the dtype of ``rows``.
            affine: the normalisation's scale and shift, ``(C,)`` each.
            silu: whether SiLU follows.
        """

    def output_transform(
        self,
        strip: Strip,
        products: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        relu: bool,
        out: Tensor,
        groups: int,
    ) -> tuple[Tensor, Tensor]:
        """Transforms ``products`` ``(positions, T, padded(O))`` into ``out``, the strip's rows of
        the output, adds ``bias`` and ``residual``, in float32 or in the dtype of ``out``, and
        applies ReLU if ``relu``; returns the `sums` of ``out``."""

    def conv_in_bands(
        self,
        whole: Strip,
        division: Bands,
        rows: Tensor,
        affine: Affine | None,
        silu: bool,
        packed: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        shortcut: Tensor | None,
        relu: bool,
        out: Tensor,
        groups: int,
    ) -> tuple[Tensor, Tensor] | None:
        """A whole convolution, with the bits of `input_transform`, `bmm` and `output_transform` of
        its strips; None where those take as long.

        Args:
            whole: the strip of all tile rows.
            rows: the input. out: the output, which may be ``rows``, where it overwrites them.
            packed: the weight, by `pack_kernels`.
            residual: is added, or its product with ``shortcut``, a packed right factor.
        """

    def sums(self, rows: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """Each group's sum and sum of squares in parts of ``rows``, ``(parts, groups, 2)``, and how
        many values of a group each part has, ``(parts,)``; all float64."""

    def padded(self, channels: int) -> int:
        """The number of columns that `bmm` writes for this number of output channels; the values in
        excess columns are undefined."""

    def pack(self, right: Tensor) -> Tensor:
        """Right factors ``(P, K, O)`` in the order in which `bmm` reads them."""

    def pack_kernels(self, scheme: Scheme, weight: Tensor) -> Tensor:
        """The transformed kernels of ``weight`` ``(O, C, 3, 3)``, of any dtype and memory layout,
        as right factors ``(kernels, C, O)`` in the order in which `bmm` reads them."""

    def bmm(self, left: Tensor, packed: Tensor, out: Tensor, order: Tensor | None = None) -> None:
        """Multiplies ``left`` ``(P, T, K)`` by packed right factors into ``out``
        ``(P, T, padded(O))``; ``order``: each one's number ``(P,)``, where several share one."""

    def multiply_tiles(self, scheme: Scheme, tiles: Tensor, weight: Tensor, out: Tensor) -> None:
        """Multiplies ``tiles`` ``(C / 64, positions, T, 64)`` by the transformed kernels of
        ``weight`` ``(O, C, 3, 3)``, of any dtype and memory layout, into ``out``
        ``(positions, T, O)``, whose rows are contiguous. C and O are multiples of 64,
        `MULTIPLE`."""

    def image_conv(
        self, rows: Tensor, packed: Tensor, bias: Tensor, out: Tensor, groups: int
    ) -> tuple[Tensor, Tensor] | None:
        """A 3x3 convolution of few channels; returns the `sums` of ``out``. None where torch's own
        kernels are as good.

        Args:
            rows: the input with a border, ``(H + 2, W + 2, C)``, contiguous and in float32.
            packed: the weight ``(3, 3, C, O)`` as a packed right factor ``(9C, O)``, where O is a
                multiple of 64, `MULTIPLE`.
            bias: ``(O,)`` in float32.
            out: ``(H, W, O)``, contiguous.
        """

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None
    ) -> Tensor | None:
        """``x`` ``(..., K)`` times the transpose of ``weight`` ``(O, K)``, plus ``bias`` ``(O,)``
        and ``residual`` ``(..., O)``, all contiguous, and in float32 but for the weight; None where
        torch's own kernels are as good."""

    def geglu(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The first half of ``x`` ``(..., K)`` times the transpose of ``weight`` ``(2O, K)``, plus
        ``bias`` ``(2O,)``, times GELU of the second half: ``(..., O)``. All are contiguous, and in
        float32 but for the weight; None where torch's own kernels are as good."""

    def attention(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor | None:
        """``softmax(query key^T scale) value`` per head: ``(B, heads, T, D)``, ``(B, heads, S, D)``
        and ``(B, heads, S, E)`` to ``(B, heads, T, E)``; None where torch's own kernel is as
        good."""

    def fingerprint(self, weight: Tensor) -> bytes:
        """A digest of all bits of a dense weight, whose bytes are a multiple of 4."""


@cache
def kernels_for(dtype: torch.dtype) -> Kernels:
    """The kernels for tensors of a dtype: Numba's for float32 only, torch's for the others."""
    return numba_kernels()[0] if dtype is torch.float32 else torch_kernels


@cache
def methods_for(dtype: torch.dtype) -> tuple[str, ...]:
    """The methods of the cost model, besides torch's own, that there are kernels for. Compiles
    them only for bfloat16 on a processor with AMX, whose kernels have no twins in torch."""
    if find_spec("numba") is None:
        return ("winograd",)
    found = ("winograd", "winograd_uncached")
    if dtype is torch.bfloat16 and has_amx_kernels() and has_numba_kernels():
        return (*found, "amx")
    return found


def uncached_bytes(tiles: int, weight: Tensor) -> int:
    """Bytes of memory, at most, that `Kernels.multiply_tiles` takes."""
    # each thread's kernels and sums
    each = 384 * 1024 + 36 * MULTIPLE * 4 * tiles
    return packing_bytes(weight) + torch.get_num_threads() * each


def packing_bytes(weight: Tensor) -> int:
    """Bytes of memory, at most, that `Kernels.pack_kernels` takes next to its result and to the
    threads' scratch memory."""
    if weight.is_contiguous():
        return 0
    out_channels, channels = weight.shape[:2]  # is copied in parts
    part = min(out_channels, part_channels(channels, torch.get_num_threads()))
    return 9 * weight.element_size() * channels * part


def has_numba_kernels() -> bool:
    """Whether the kernels for float32 are Numba's. With torch's, the fast backend takes less memory
    than the reference, not less time."""
    return numba_kernels()[0] is not torch_kernels


@cache
def numba_kernels() -> tuple[Kernels, float]:
    """The Numba kernels, and the seconds it took to compile them or to read them from Numba's
    cache; torch's kernels where Numba is not installed.

    Warns:
        SdconvWarning: Numba is installed and does not work here; torch's kernels are used.
    """
    begin = time.perf_counter()
    if find_spec("numba") is None:
        return torch_kernels, 0.0
    try:
        from sdconv.fast.cpu.numba import kernels
    except (ImportError, OSError, RuntimeError) as error:  # an unsuitable NumPy; no cache folder
        what = f"the fast backend computes without Numba, slower: {error}"
        if not isinstance(error, ProcessorError):
            what += ". hint: install the versions that sdconv[fast] asks for; NUMBA_CACHE_DIR "
            what += "names a cache"
        warnings.warn(SdconvWarning(what), stacklevel=2)
        return torch_kernels, 0.0
    return kernels, time.perf_counter() - begin

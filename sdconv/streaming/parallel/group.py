"""What ranks tell each other: what they were called with, rows of feature maps, statistics.

Everything goes through ``torch.distributed``. All sums are taken in the order of the ranks, so that
every rank has the same bits.
"""

from __future__ import annotations

import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from sdconv.errors import InputError, SdconvError
from sdconv.fast.cpu.conv import NotFiniteError
from sdconv.streaming.group_stats import RunningGroupStats
from sdconv.streaming.parallel.bands import Message

# the process group's backend for a device
_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
# number of pixels, mean and sum of squared deviations of each channel in a strip
Moments = tuple[int, Tensor, Tensor]


class AgreedError(InputError):
    """An error that all ranks raise alike, instead of communicating."""


class RankGroup:
    """The ranks that compute an image together.

    Args:
        group: None for all ranks, in a process group of their own, so that their messages never
            meet the caller's.
        device: where the feature maps are.
        timeout: seconds for which a rank waits for another, in a group of their own.

    Raises:
        SdconvError: ``torch.distributed`` is not initialised, this process is not in the group, the
            group's backend does not serve the device, or not all ranks get here in time.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, device: torch.device, timeout: float
    ) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise SdconvError(
                "torch.distributed is not initialised",
                where="enable_parallel",
                hint="run it under torchrun, and call torch.distributed.init_process_group() first",
            )
        if device.type not in _BACKENDS:
            raise InputError(
                "ranks cannot send feature maps from this device",
                where="enable_parallel",
                expected=" or ".join(_BACKENDS),
                got=device.type,
            )
        if timeout <= 0:
            raise InputError("not a positive number of seconds", where="timeout", got=timeout)
        self.device, self._closed, self._is_own = device, False, group is None
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise InputError("this process is not in the group", where="enable_parallel")
        # torch 2.6 takes None for no group here
        self._members = dist.get_process_group_ranks(group or dist.group.WORLD)
        backend = _BACKENDS[device.type]
        if group is None:
            with self._communicating():
                limit = timedelta(seconds=timeout)
                self._group: Any = dist.new_group(timeout=limit, backend=backend)
            return
        self._group = group
        serving = f"{device.type}:{backend}"
        if serving not in (config := dist.get_backend_config(group)).split(","):
            raise InputError(
                "the group's backend does not send feature maps from this device",
                where="enable_parallel",
                expected=serving,
                got=config,
            )

    def __deepcopy__(self, memo: object) -> RankGroup:
        """A copy of a network is computed by the same ranks."""
        return self

    def close(self) -> None:
        """Leaves the other ranks, which get an error if they wait for this one."""
        group, self._group, self._closed = self._group, None, True
        if self._is_own and group is not None and dist.is_initialized():
            # before torch 2.8, a group ends while it holds Python's lock, for which its threads may
            # wait to release tensors; its backend, which ends without the lock, must go last
            backend = group._get_backend(self.device)
            dist.destroy_process_group(group)
            del group
            del backend  # and with it the connections

    @contextmanager
    def closing_on_failure(self) -> Iterator[None]:
        """Leaves the other ranks if this one fails alone, so that they need not wait for it."""
        try:
            yield
        except (AgreedError, NotFiniteError):
            raise  # all ranks do
        except BaseException:
            self.close()
            raise

    def agree(
        self, facts: Mapping[str, object], told: Any = None, *, hints: Mapping[str, str]
    ) -> list[Any]:
        """Compares facts that must be the same on every rank, and returns what each one tells.

        Args:
            facts: by their names.
            told: sent to every rank, not compared.
            hints: what to do about a difference, by the fact's name.

        Raises:
            AgreedError: a fact differs, or a rank called `share` with an error; on every rank.
        """
        answers = self._gather_objects(({name: str(fact) for name, fact in facts.items()}, told))
        for name in answers[0][0]:
            values = [known[name] for known, _ in answers]
            if len(set(values)) > 1:
                raise AgreedError(
                    f"the ranks differ in {name}",
                    where="ranks",
                    expected="the same on every rank",
                    got=", ".join(f"{value} (rank {n})" for n, value in enumerate(values)),
                    hint=hints.get(name),
                )
        return [told for _, told in answers]

    def share(self, error: SdconvError) -> NoReturn:
        """Raises this rank's error on every rank; called in place of `agree`.

        Raises:
            AgreedError: with the error's message.
        """
        self._gather_objects(error)
        raise AssertionError("an error was shared, and nothing raised")

    def _gather_objects(self, own: Any) -> list[Any]:
        answers: list[Any] = [None] * self.size
        with self._communicating():
            dist.all_gather_object(answers, own, group=self._group)
        errors = {rank: one for rank, one in enumerate(answers) if isinstance(one, SdconvError)}
        if errors:
            rank, error = next(iter(errors.items()))
            alike = len({str(one) for one in errors.values()}) == 1 and len(errors) == self.size
            raise AgreedError(f"{error}" if alike else f"on rank {rank}: {error}") from error
        return answers

    def exchange(self, rows: Tensor, first: int, messages: Sequence[Message]) -> Callable[[], None]:
        """Sends this rank's rows to the ranks that need them, and begins to receive those that it
        needs.

        Args:
            rows: of a feature map, ``(rows, W, C)``; both what is sent and what is received.
            first: the number of the first one.
            messages: of all ranks.

        Returns:
            A function that waits, and writes the received rows to their places.
        """
        operations: list[dist.P2POp] = []
        received: list[tuple[range, Tensor]] = []
        for message in messages:
            if self.rank not in (message.sender, message.receiver):
                continue
            sends = self.rank == message.sender
            # a copy of what is sent, because a step may overwrite its source
            shape = (len(message.rows), *rows.shape[1:])
            part = torch.empty(shape, dtype=rows.dtype, device=self.device)
            if sends:
                part.copy_(_numbered(rows, first, message.rows))
            if message.receiver == self.rank:
                received.append((message.places, part))
            if message.sender != message.receiver:
                peer = self._members[message.receiver if sends else message.sender]
                operation = dist.isend if sends else dist.irecv
                operations.append(dist.P2POp(operation, _bytes(part), peer, self._group))
        with self._communicating():
            works = dist.batch_isend_irecv(operations) if operations else []

        def wait() -> None:
            with self._communicating():
                while works:
                    works.pop(0).wait()
            while received:
                places, part = received.pop()
                _numbered(rows, first, places).copy_(part)

        return wait

    def gather_moments(
        self, own: Sequence[Moments], strips: Sequence[int], channels: int, *, failed: bool
    ) -> RunningGroupStats:
        """The statistics of a whole feature map, from those of every rank's strips.

        They are combined in the order of ranks and strips, as a run without ranks combines the
        same strips, to the same bits.

        Args:
            own: of this rank's strips.
            strips: how many each rank has.
            channels: of the feature map; 0 if no statistics are needed, only `failed`.
            failed: whether this rank's output is not finite.

        Raises:
            NotFiniteError: a rank's output is not finite; on every rank.
        """
        size = 1 + max(strips), 1 + 2 * channels
        sent = torch.zeros(size, dtype=torch.float64, device="cpu")
        sent[0, 0] = failed
        if not failed:
            for row, (count, mean, squares) in zip(sent[1:], own, strict=False):
                row[0], row[1 : 1 + channels], row[1 + channels :] = count, mean, squares
        sent = sent.to(self.device)
        answers = [torch.empty_like(sent) for _ in range(self.size)]
        with self._communicating():
            dist.all_gather(answers, sent, group=self._group)
        if any(answer[0, 0] for answer in answers):
            raise NotFiniteError
        stats = RunningGroupStats(channels, self.device)
        for answer, strips_there in zip(answers, strips, strict=True):
            of_strips = answer[1 : 1 + strips_there] if channels else answer[:0]
            for count, row in zip(of_strips[:, 0].tolist(), of_strips, strict=True):
                stats.combine(int(count), row[1 : 1 + channels], row[1 + channels :])
        return stats

    def spread(self, rows: Tensor, owned: Sequence[range]) -> Callable[[], None]:
        """Begins to give every rank the rows of all others.

        Args:
            rows: a whole feature map, ``(H, W, C)``, of which this rank has its own rows.
            owned: the rows of each rank.

        Returns:
            A function that waits, and writes the other ranks' rows.
        """
        parts, works = [], []
        for rank, own in enumerate(owned):
            if own and self.size > 1:
                part = rows[own.start : own.stop].to(self.device).contiguous()
                with self._communicating():
                    works.append(
                        dist.broadcast(
                            _bytes(part), self._members[rank], group=self._group, async_op=True
                        )
                    )
                parts.append((own, part))

        def wait() -> None:
            with self._communicating():
                while works:
                    works.pop(0).wait()
            while parts:
                own, part = parts.pop()
                target = rows[own.start : own.stop]
                if part.data_ptr() != target.data_ptr():
                    target.copy_(part)

        return wait

    @contextmanager
    def _communicating(self) -> Iterator[None]:
        """Translates torch's errors.

        Raises:
            SdconvError: another rank ended, or did not answer in time.
        """
        where = f"rank {self.rank} of {self.size}"
        if self._closed:
            raise SdconvError(
                "the ranks are no longer connected",
                where=where,
                hint="call enable_parallel() again, on every rank",
            )
        # NCCL and pickled objects use the current device
        on_cuda = self.device.type == "cuda"
        try:
            with torch.cuda.device(self.device) if on_cuda else nullcontext():
                yield
        except RuntimeError as error:
            traceback.clear_frames(error.__traceback__)  # torch's, which refer to the group
            raise SdconvError(
                "another rank ended, or did not answer in time",
                where=where,
                got=str(error).strip().partition("\n")[0],
                hint="the first rank to fail says why; if one is only slow, raise timeout=",
            ) from error


def checksum(tensors: Iterable[Tensor]) -> int:
    """A CRC-32 of all values, in this order."""
    found = 0
    for tensor in tensors:
        if tensor.numel():
            flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
            found = zlib.crc32(flat.cpu().numpy().data, found)
    return found


def _numbered(rows: Tensor, first: int, numbers: range) -> Tensor:
    """The rows with these numbers, where the first one is number ``first``."""
    return rows[numbers.start - first : numbers.stop - first]


def _bytes(tensor: Tensor) -> Tensor:
    """The tensor's memory, which any backend can send."""
    return tensor.view(torch.uint8)

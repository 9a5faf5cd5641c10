"""Reads torch checkpoints (``.ckpt``, ``.pth``, ``.pt``, ``.bin``) without running their pickles.

A pickle is a program: it names functions and classes of the reader's Python (its *globals*) and
calls them. Here only ``torch.load(weights_only=True)`` interprets it, which knows tensors, plain
containers and no other global, and calls nothing else.

Training code stores its own objects together with the weights. For each class of such an object (a
capitalised name in a package that is neither Python's own nor torch), ``safe_globals`` of
``torch.serialization`` gets an empty class under that name. The module of that name is never
imported, so its code never runs. The empty class accepts any arguments and any state, and keeps
none. Functions are not replaced, and Python's and torch's own names only if they are listed in
``STAND_INS``. Everything else is refused by its name before torch reads the file, and there is no
fallback to a less strict reader. Globals that the running program itself has passed to
``torch.serialization.add_safe_globals`` are that program's responsibility.
"""

from __future__ import annotations

import io
import pickletools
import re
import sys
import warnings
import zipfile
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import IO, Any

import torch

from sdconv.checkpoint.io.files import AGAIN, LARGEST_TEXT, foreign, os_errors, regular_file, short
from sdconv.checkpoint.io.header import read_header
from sdconv.errors import CheckpointError, InputError, SdconvWarning

PICKLE_SUFFIXES = (".ckpt", ".pth", ".pt", ".bin")
"""The suffixes of files that are read as pickles."""

STAND_INS = frozenset(
    {
        *(f"builtins.{name}" for name in "bool bytes dict float frozenset int list".split()),
        *(f"builtins.{name}" for name in "object range slice str tuple".split()),
        *(f"collections.{name}" for name in "ChainMap UserDict UserList defaultdict deque".split()),
        *(f"datetime.{name}" for name in "date datetime time timedelta timezone".split()),
        *(f"pathlib.{name}" for name in "Path PosixPath PurePosixPath".split()),
        *(f"pathlib.{name}" for name in "PureWindowsPath WindowsPath".split()),
        "argparse.Namespace",
        "decimal.Decimal",
        "fractions.Fraction",
        "types.SimpleNamespace",
        "typing.Any",
        "uuid.UUID",
        # for numpy's arrays, scalars and random states
        *(
            f"numpy.{core}.multiarray.{name}"
            for core in ("core", "_core")
            for name in ("_reconstruct", "scalar")
        ),
        *(
            f"numpy.random._pickle.__{name}_ctor"
            for name in ("randomstate", "generator", "bit_generator")
        ),
        "numpy.random.bit_generator.__pyx_unpickle_SeedSequence",
        *(f"numpy.{name}" for name in "bool bool_ dtype ndarray object_ str_".split()),
        *(f"numpy.{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
        *(f"numpy.{name}" for name in "float16 float32 float64 complex64 complex128".split()),
    }
)
"""Names that get a stand-in although they are Python's own, or are not capitalised."""

WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "params")
"""Names under which training code often stores the weights."""

# training code's own state, whose tensors are not weights
_NOT_WEIGHTS = re.compile(r"(optim|opt_|scheduler|lr_|rng|loops|scaler|amp).*|opt", re.IGNORECASE)
_OUTERMOST = "."
_LONGEST_PATH = 200


@dataclass
class _Choice:
    """A key, and whether a pickle has been read by it."""

    key: str
    used: bool = False


_choice: ContextVar[_Choice | None] = ContextVar("sdconv_pickle_key", default=None)


@contextmanager
def weights_key(key: str | None) -> Iterator[None]:
    """Chooses among several sets of weights in one pickle, in this thread.

    Args:
        key: where the weights are, such as ``"params_ema"`` or ``"model.state_dict"``; ``"."`` for
            the outermost dict. None for the only ones, or for those chosen by a context around
            this one.

    Warns:
        SdconvWarning: no pickle was read within it.
    """
    if key is None:
        yield
        return
    if not isinstance(key, str):
        raise InputError(
            "not a name", where="key", expected="'ema', 'model.state_dict' or the like", got=key
        )
    choice, around = _Choice(key), _choice.get()
    token = _choice.set(choice)
    try:
        yield
    finally:
        _choice.reset(token)
    if choice.used and around is not None:
        around.used = True
    if not choice.used:
        what = f"the key {short(key)} chose nothing: it is for pickles, and none was opened"
        warnings.warn(SdconvWarning(f"{what}. hint: leave the key out"), stacklevel=3)


_ONE_AT_A_TIME = Lock()  # torch has one list of safe globals for all threads
_MOST_STAND_INS = 1000  # far more than training code has classes
_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before its zip format
_SAFER = (
    "get the same weights as a .safetensors file; if you trust the author, load the file with the "
    "code that wrote it, and save its state dict"
)


def read_pickle(path: str | Path) -> dict[str, torch.Tensor]:
    """The named tensors of a torch checkpoint, on the CPU; memory-mapped in the zip format.

    The weights are a dict of tensors, in dicts and lists of any depth. Everything else in the file
    is dropped. A single tensor alone gets the name ``tensor``.

    Raises:
        CheckpointError: the file cannot be read, is not a torch checkpoint, asks for more than
            tensors and plain containers, or has no weights, or several and ``weights_key`` does
            not choose one of them.
        InputError: ``path`` is not a path.
    """
    file, _ = regular_file(path)
    with os_errors(file), file.open("rb") as handle:
        is_zip = handle.read(4) == b"PK\x03\x04"  # torch's own way to distinguish its two formats
    program, mappable = _zip_program(file) if is_zip else (_legacy_program(file), False)
    with _ONE_AT_A_TIME:
        stand_ins: list[Any] = [(_stand_in(name), name) for name in _let_in(file, program)]
        try:
            with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
                warnings.simplefilter("ignore")  # about old protocols and storages, which load too
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=mappable)
                return _weights(file, content)
        except CheckpointError:
            raise
        except Exception as error:  # a hostile pickle may raise anything out of torch
            raise CheckpointError(
                "cannot be read as a torch checkpoint",
                where=file,
                expected="tensors and plain containers, as torch.save writes a state dict",
                got=_reason(error),
                hint=f"{AGAIN}; or {_SAFER}",
            ) from error


class _Inert:
    """Replaces an object of an unknown class: it accepts anything, and keeps and does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> Any:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _InertDict(_Inert):
    """Replaces a kind of dict: torch's reader fills only plain ones, and sets the state only of an
    OrderedDict."""

    def __new__(cls, *args: object, **kwargs: object) -> Any:
        return OrderedDict()


class _InertList(_Inert):
    """Replaces a kind of list: torch's reader fills only plain ones."""

    def __new__(cls, *args: object, **kwargs: object) -> Any:
        return []


def _let_in(file: Path, program: bytes) -> list[str]:
    """The globals that need a stand-in; an error if one must not have it."""
    names = _unsafe_globals(file, program)
    refused = sorted(name for name in names if not _may_stand_in(name))
    if refused or len(names) > _MOST_STAND_INS:
        raise _refused(file, refused or sorted(names))
    return names


def _may_stand_in(name: str) -> bool:
    """Whether a name is in ``STAND_INS``, or a class outside of Python's and torch's packages."""
    package, *inner = name.split(".")
    is_class = bool(inner) and inner[-1].lstrip("_")[:1].isupper()
    foreign = package not in sys.stdlib_module_names and package not in ("torch", "__builtin__")
    return name in STAND_INS or (is_class and foreign and name.replace(".", "_").isidentifier())


def _stand_in(name: str) -> type[_Inert]:
    kind = name.rpartition(".")[2]
    if kind in ("dict", "defaultdict") or kind.endswith("Dict"):
        return _InertDict
    return _InertList if kind in ("list", "deque") else _Inert


def _zip_program(file: Path) -> tuple[bytes, bool]:
    """The pickle inside torch's zip format, and whether its tensors can be mapped."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            programs = [m for m in members if m.filename.partition("/")[2] == "data.pkl"]
            others = {m.filename.partition("/")[2] for m in members}
            if "constants.pkl" in others:
                raise CheckpointError(
                    "is a TorchScript program, not a checkpoint",
                    where=file,
                    hint="if you trust it, load it with torch.jit.load and save its state dict",
                )
            if len(programs) != 1 or programs[0].file_size > LARGEST_TEXT:
                raise CheckpointError(
                    "is a zip archive, but not a torch checkpoint",
                    where=file,
                    expected=f"one data.pkl of at most {LARGEST_TEXT} bytes in one folder",
                    got=f"{len(members)} members: {short([m.filename for m in members[:8]])}",
                    hint="if it is an archive of weights, unpack it first",
                )
            # a member that was compressed afterwards cannot be mapped
            stored = all(m.compress_type == zipfile.ZIP_STORED for m in members)
            return archive.read(programs[0]), stored
    except CheckpointError:
        raise
    except Exception as error:  # zipfile raises a dozen kinds on a damaged archive
        raise CheckpointError(
            "is a damaged zip archive", where=file, got=_reason(error), hint=AGAIN
        ) from error


def _legacy_program(file: Path) -> bytes:
    """The pickle with the content in the older format: the fourth in the file."""
    with os_errors(file), file.open("rb") as handle:
        head = handle.read(64)
        handle.seek(0)
        if not head.startswith(_LEGACY_START):
            raise _not_torch(file, head, handle)
        try:
            for _ in range(3):  # a magic number, the protocol, facts about the machine
                _skip_pickle(handle)
            start = handle.tell()
            _skip_pickle(handle)
            end = handle.tell()
        except Exception as error:  # pickletools raises several kinds on damaged opcodes
            raise CheckpointError(
                "is a damaged pickle, or cut short", where=file, got=_reason(error), hint=AGAIN
            ) from error
        handle.seek(start)
        return handle.read(end - start)


def _skip_pickle(handle: IO[bytes]) -> None:
    for _ in pickletools.genops(handle):
        pass


def _not_torch(file: Path, head: bytes, handle: IO[bytes]) -> CheckpointError:
    """The error for a file that is in neither of torch's two formats."""
    try:
        read_header(file)
    except CheckpointError:
        names, whole = _named_globals(handle)
        is_pickle = whole or head.startswith(b"\x80")
        if is_pickle and names:
            return _refused(file, names)
        other = None if is_pickle else foreign(file, head)
        return other or CheckpointError(
            f"is {'a pickle, but ' if is_pickle else ''}not a torch checkpoint",
            where=file,
            expected="what torch.save writes",
            got=f"first bytes {head[:16]!r}",
            hint=AGAIN,
        )
    return CheckpointError(
        "is a safetensors file under a pickle's name",
        where=file,
        hint="let its name end in .safetensors",
    )


def _unsafe_globals(file: Path, program: bytes) -> list[str]:
    """The globals of a pickle that torch's restricted reader does not know.

    torch lists them only for its zip format, so the program is put into such an archive.
    """
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as writer:
        writer.writestr("archive/data.pkl", program)
        writer.writestr("archive/version", "3\n")
    archive.seek(0)
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(archive)
    except Exception as error:  # opcodes of later protocols, or no pickle at all
        names, _ = _named_globals(io.BytesIO(program))
        raise CheckpointError(
            "is a pickle that torch's restricted reader does not accept",
            where=file,
            expected="pickle protocol 2, which torch.save writes",
            got=f"{_reason(error)}; it asks for {', '.join(names[:10]) or 'no global'}",
            hint=_SAFER,
        ) from error


def _named_globals(program: IO[bytes]) -> tuple[list[str], bool]:
    """The globals that a pickle of any protocol seems to name, and whether it is complete.

    For messages only: torch's reader decides what is refused.
    """
    names: set[str] = set()
    strings: list[str] = []
    memo: dict[int, str] = {}
    try:
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name in ("GLOBAL", "INST"):
                names.add(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                names.add(".".join(strings[-2:]))
            elif isinstance(argument, str):
                strings.append(argument)
            elif opcode.name == "MEMOIZE" or "PUT" in opcode.name:
                memo[len(memo) if argument is None else argument] = strings[-1] if strings else "?"
            elif "GET" in opcode.name and argument in memo:
                strings.append(memo[argument])
    except Exception:  # pickletools raises several kinds on damaged opcodes
        return sorted(names), False
    return sorted(names), True


def _refused(file: Path, names: list[str]) -> CheckpointError:
    listed = ", ".join(map(_printable, names[:10])) + (", ..." if len(names) > 10 else "")
    return CheckpointError(
        f"asks for {listed}, which is refused; nothing in it was run",
        where=file,
        expected="tensors, plain containers and objects of training code's classes",
        got=f"a pickle that names {len(names)} refused globals",
        hint=_SAFER,
    )


def _printable(name: str) -> str:
    return name if name.isprintable() and len(name) <= 120 else short(name)


def _reason(error: Exception) -> str:
    """The part of an exception's text that says what is wrong, without torch's unsafe advice."""
    text = str(error).rpartition("WeightsUnpickler error: ")[2]
    text = text.partition("\n\nCheck the documentation")[0].strip()
    return short(text) if len(text) > 300 else text or type(error).__name__


def _weights(file: Path, content: object) -> dict[str, torch.Tensor]:
    if isinstance(content, torch.Tensor):  # such as a pipeline's latents
        return {"tensor": torch.Tensor.detach(content)}
    dicts = _dicts_of_tensors(content)
    # the weights of a network have names of several parts
    candidates = {k: v for k, v in dicts.items() if any("." in name for name in v)}
    choice = _choice.get()
    if choice is not None:
        choice.used = True
        if choice.key in dicts:
            return dicts[choice.key]
        raise CheckpointError(
            f"holds no weights under {short(choice.key)}",
            where=file,
            expected=_listed(candidates or dicts),
            hint="leave the key out" if len(candidates) == 1 else None,
        )
    if len(candidates) > 1:
        names = list(candidates)
        raise CheckpointError(
            "holds several sets of weights, and it is unclear which one is meant",
            where=file,
            expected="one set of weights",
            got=_listed(candidates),
            hint=f"to choose, pass key={names[0]!r}",
        )
    usual = [dicts[name] for name in (*WRAPPERS, _OUTERMOST) if name in dicts]
    others = list(dicts.values()) if len(dicts) == 1 else []
    for found in (*candidates.values(), *usual, *others):
        return found
    keys = sorted(map(str, content)) if isinstance(content, Mapping) else None
    if _has_objects(content):
        raise CheckpointError(
            "is a pickle with other objects in the place of tensors, such as numpy arrays",
            where=file,
            expected="tensors by name",
            hint="save them as tensors: torch.from_numpy(array)",
        )
    raise CheckpointError(
        "is a pickle without weights",
        where=file,
        expected=f"tensors by name, bare or in a dict, such as {', '.join(WRAPPERS)}",
        got=type(content).__name__ if keys is None else f"a dict of {short(keys)}",
        hint="check that it is a checkpoint of a network, and which part of it is the weights",
    )


def _dicts_of_tensors(content: object) -> dict[str, dict[str, torch.Tensor]]:
    """Every dict that holds tensors, by the names and numbers that lead to it, joined by dots."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    seen: set[int] = set()
    queue: deque[tuple[str, object]] = deque([("", content)])
    while queue:
        path, one = queue.popleft()
        if not isinstance(one, Mapping | list | tuple) or id(one) in seen:
            continue
        if len(path) > _LONGEST_PATH:
            continue
        seen.add(id(one))
        if isinstance(one, Mapping) and (tensors := _tensors(one)):
            found[path or _OUTERMOST] = tensors
        for name, value in one.items() if isinstance(one, Mapping) else enumerate(one):
            if isinstance(name, str | int) and not _NOT_WEIGHTS.fullmatch(str(name)):
                queue.append((f"{path}.{name}" if path else str(name), value))
    return found


def _has_objects(content: object) -> bool:
    """Whether a dict, or one in it, has objects that were not read under the names of weights."""
    outer = [content] if isinstance(content, Mapping) else []
    inner = [one for each in outer for one in each.values() if isinstance(one, Mapping)]
    return any(
        isinstance(value, _Inert) and str(name).endswith((".weight", ".bias"))
        for each in (*outer, *inner)
        for name, value in each.items()
    )


def _listed(dicts: Mapping[str, Mapping[str, torch.Tensor]]) -> str:
    listed = [f"{short(name)} ({len(tensors)} tensors)" for name, tensors in dicts.items()]
    return ", ".join(listed[:10]) + (", ..." if len(listed) > 10 else "") or "weights"


def _tensors(candidate: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    # not value.detach(): a pickle may give a tensor an attribute of that name
    return {
        name: torch.Tensor.detach(value)
        for name, value in candidate.items()
        if isinstance(name, str) and isinstance(value, torch.Tensor)
    }

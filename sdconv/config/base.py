"""What every configuration has in common: fields by attribute and by key, and ``config.json`` both
ways.

Field names are diffusers', so that a config reads the same on both sides. A field has no default
when weights
decide it: leaving one out is a ``TypeError``, not a guess.
"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

from sdconv.errors import CheckpointError, SdconvWarning

MOST_LEVELS, MOST_LAYERS, WIDEST = 64, 64, 1 << 20


class Config(Mapping[str, Any]):
    """A network's configuration: fields by attribute (``config.latent_channels``) and by key
    (``config["..."]``).

    As a mapping it has exactly the keys of the ``config.json`` that diffusers writes for the class
    of the same name.
    """

    class_name: ClassVar[str]
    # what diffusers assumes where an old config.json says nothing
    assumed: ClassVar[Mapping[str, Any]] = {}
    # keys of a config.json that have one value in the networks built here; another value is refused
    constant: ClassVar[Mapping[str, Any]] = {}
    # keys of a config.json that follow from other fields
    derived: ClassVar[frozenset[str]] = frozenset()
    # keys of a config.json that this network has no use for, whatever they say
    unused: ClassVar[frozenset[str]] = frozenset()
    # fields that no tensor's shape tells
    beyond_shapes: ClassVar[frozenset[str]] = frozenset()
    # fields unknown to diffusers, which are written only where they say something
    extensions: ClassVar[frozenset[str]] = frozenset()

    def __getitem__(self, key: str) -> Any:
        if key in self._keys():
            return getattr(self, key)
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys())

    def __len__(self) -> int:
        return len(self._keys())

    def _keys(self) -> list[str]:
        names = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        return names + sorted(self.derived | set(self.constant))

    def __getattr__(self, name: str) -> Any:
        if name in type(self).constant:
            return type(self).constant[name]
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    def to_json(self) -> dict[str, Any]:
        """The content of a ``config.json`` that diffusers reads."""
        silent = {k for k in self.extensions if self[k] == self.assumed[k]}
        kept = {k: v for k, v in self.items() if k not in silent}
        lists = {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}
        return {"_class_name": self.class_name, **lists}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: object) -> Self:
        """Reads the content of a ``config.json``.

        Args:
            content: the parsed JSON object.
            where: the file's name, for messages.

        Raises:
            CheckpointError: a field is missing, of the wrong type, or asks for something this
            network has not.
        """
        given = {k: v for k, v in content.items() if not k.startswith("_")}
        for key, value in cls.constant.items():
            if key in given and given[key] != value:
                raise CheckpointError(
                    f"config.json asks for {key} = {given[key]!r}",
                    where=where,
                    expected=f"{key} = {value!r}",
                    got=repr(given[key]),
                    hint="sdconv does not build this variant; use diffusers for it",
                )
        fields = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = set(given) - fields - set(cls.constant) - cls.derived - cls.unused
        if unknown:
            warnings.warn(
                f"{where}: unknown fields are passed over: {', '.join(sorted(unknown))}",
                SdconvWarning,
                stacklevel=2,
            )
        values = {**cls.assumed, **{k: v for k, v in given.items() if k in fields}}
        hints = typing.get_type_hints(cls)
        for key in fields & set(given):
            if not _fits(_frozen(given[key]), hints[key]):
                raise CheckpointError(
                    f"config.json has a value of the wrong type for {key}",
                    where=where,
                    expected=str(hints[key]).removeprefix("<class '").removesuffix("'>"),
                    got=repr(given[key])[:80],
                    hint="remove config.json: the config is then read from the weights' shapes",
                )
        missing = fields - set(values)
        if missing:
            raise CheckpointError(
                f"config.json lacks {', '.join(sorted(missing))}",
                where=where,
                expected=f"the fields of {cls.class_name}",
                got=", ".join(sorted(given)) or "none",
                hint="remove config.json: the config is then read from the weights' shapes",
            )
        try:
            config = cls(**{k: _frozen(v) for k, v in values.items()})
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"config.json does not describe a {cls.class_name}: {error}",
                where=where,
                hint="remove config.json: the config is then read from the weights' shapes",
            ) from error
        for key in sorted((cls.derived - cls.unused) & set(given)):
            if _frozen(given[key]) != config[key]:
                raise CheckpointError(
                    f"config.json contradicts itself in {key}",
                    where=where,
                    expected=f"{config[key]!r}, which follows from its other fields",
                    got=repr(given[key])[:80],
                    hint=f"if the weights are of this network, remove {key} from config.json; "
                    "otherwise use diffusers for it",
                )
        return config


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotation's type; a whole number is a float too, NaN is none."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        each = parts[:1] * len(value) if isinstance(value, tuple) and parts[-1] is ... else parts
        return isinstance(value, tuple) and len(value) == len(each) and all(map(_fits, value, each))
    if hint is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    if hint is int:
        return type(value) is int
    return not isinstance(hint, type) or isinstance(value, hint)


def check_positive(**named: Any) -> None:
    """Refuses what is not a positive int or a non-empty tuple of them; ``bool`` is no int here."""
    for name, value in named.items():
        items = value if isinstance(value, tuple) else (value,)
        if not items or any(type(item) is not int or item < 1 for item in items):
            raise ValueError(f"{name} = {value!r} is not made of positive integers")
        # far beyond any network, and far below what would take for ever to build
        if len(items) > MOST_LEVELS or max(items) > WIDEST:
            raise ValueError(f"{name} has a number or a length that no network has")


def check_layers(**named: Any) -> None:
    """Refuses what is no count of layers: an int from 0 to 64, or a tuple of them."""
    for name, value in named.items():
        items = value if isinstance(value, tuple) else (value,)
        if any(type(item) is not int or not 0 <= item <= MOST_LAYERS for item in items):
            raise ValueError(f"{name} = {value!r} is not made of counts from 0 to {MOST_LAYERS}")


def check_divisible(channels: tuple[int, ...], groups: int) -> None:
    for count in channels:
        if count % groups:
            raise ValueError(f"{count} channels cannot be split into {groups} normalisation groups")

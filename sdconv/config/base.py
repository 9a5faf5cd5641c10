"""The base of every config: fields by attribute and by key, read from and written to JSON.

Field names are diffusers', so that a config reads the same in both libraries. A field that depends
on the weights has no default: leaving it out is a ``TypeError``, not a guess.
"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Self, cast

from sdconv.errors import CheckpointError, SdconvWarning

OPEN_KEY = "_sdconv_open_to"
"""The key of a ``config.json`` for the families between which nothing decided."""

MOST_LEVELS, MOST_LAYERS, WIDEST = 64, 64, 1 << 20


class Config(Mapping[str, Any]):
    """A network's configuration: fields by attribute (``config.latent_channels``) and by key
    (``config["..."]``).

    As a mapping it has exactly the keys of the ``config.json`` that diffusers writes for the class
    of the same name.
    """

    class_name: ClassVar[str]
    # diffusers' defaults for fields that an old config.json does not have
    assumed: ClassVar[Mapping[str, Any]] = {}
    # keys of a config.json with only one value that sdconv can build; any other is refused
    constant: ClassVar[Mapping[str, Any]] = {}
    # keys of a config.json that are determined by other fields
    derived: ClassVar[frozenset[str]] = frozenset()
    # keys of a config.json that this network does not use, with any value
    unused: ClassVar[frozenset[str]] = frozenset()
    # fields that cannot be inferred from shapes
    beyond_shapes: ClassVar[frozenset[str]] = frozenset()
    # fields that diffusers does not have; they are written only if they differ from the default
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
        return self.field_names() + sorted(self.derived | set(self.constant))

    @classmethod
    def field_names(cls) -> list[str]:
        """The names of the dataclass's fields."""
        # the subclasses are dataclasses, which the type checker cannot know here
        return [field.name for field in dataclasses.fields(cast(Any, cls))]

    @property
    def open_to(self) -> tuple[str, ...]:
        """The families between which nothing decided when this config was inferred; empty if the
        family is certain. It is written with the config, and does not count for equality."""
        families: tuple[str, ...] = vars(self).get("_open_to", ())
        return families

    def left_open(self, families: Iterable[str]) -> Self:
        """The same config, which says that its family is open."""
        same = dataclasses.replace(cast(Any, self))
        object.__setattr__(same, "_open_to", tuple(families))
        return cast(Self, same)

    def __getattr__(self, name: str) -> Any:
        if name in type(self).constant:
            return type(self).constant[name]
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    def to_json(self) -> dict[str, Any]:
        """The content of a ``config.json`` that diffusers reads."""
        silent = {k for k in self.extensions if self[k] == self.assumed[k]}
        kept = {k: v for k, v in self.items() if k not in silent}
        lists = {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}
        # diffusers ignores keys that begin with an underscore
        doubt = {OPEN_KEY: list(self.open_to)} if self.open_to else {}
        return {"_class_name": self.class_name, **doubt, **lists}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: object) -> Self:
        """Reads the content of a ``config.json``.

        Args:
            content: the parsed JSON object.
            where: the file's name, for messages.

        Raises:
            CheckpointError: a field is missing, of the wrong type, or has a value that sdconv does
                not build.

        Warns:
            SdconvWarning: there are unknown fields, which are ignored.
        """
        given = {k: v for k, v in content.items() if not k.startswith("_")}
        for key, value in cls.constant.items():
            if key in given and given[key] != value:
                raise CheckpointError(
                    f"config.json asks for {key} = {given[key]!r}",
                    where=where,
                    expected=f"{key} = {value!r}",
                    got=repr(given[key]),
                    hint="sdconv does not build this variant; use diffusers",
                )
        fields = set(cls.field_names())
        unknown = set(given) - fields - set(cls.constant) - cls.derived - cls.unused
        if unknown:
            warnings.warn(
                f"{where}: unknown fields are ignored: {', '.join(sorted(unknown))}",
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
                    hint="remove config.json: the config is then inferred from the weights' shapes",
                )
        missing = fields - set(values)
        if missing:
            raise CheckpointError(
                f"config.json lacks {', '.join(sorted(missing))}",
                where=where,
                expected=f"the fields of {cls.class_name}",
                got=", ".join(sorted(given)) or "none",
                hint="remove config.json: the config is then inferred from the weights' shapes",
            )
        try:
            config = cls(**{k: _frozen(v) for k, v in values.items()})
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"config.json does not describe a {cls.class_name}: {error}",
                where=where,
                hint="remove config.json: the config is then inferred from the weights' shapes",
            ) from error
        for key in sorted((cls.derived - cls.unused) & set(given)):
            if _frozen(given[key]) != config[key]:
                raise CheckpointError(
                    f"config.json contradicts itself in {key}",
                    where=where,
                    expected=f"{config[key]!r}, according to its other fields",
                    got=repr(given[key])[:80],
                    hint=f"if the weights belong to this network, remove {key} from config.json; "
                    "otherwise use diffusers",
                )
        families = content.get(OPEN_KEY)
        if isinstance(families, list) and all(isinstance(name, str) for name in families):
            return config.left_open(families)
        return config


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has an annotation's type; an int is a float too, NaN and infinity are not."""
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
    """Checks that each value is a positive int or a non-empty tuple of them; a bool is not an int.

    Raises:
        ValueError: one is not.
    """
    for name, value in named.items():
        items = value if isinstance(value, tuple) else (value,)
        if not items or any(type(item) is not int or item < 1 for item in items):
            raise ValueError(f"{name} = {value!r} is not made of positive integers")
        # far more than any network has, and far less than what would take forever to build
        if len(items) > MOST_LEVELS or max(items) > WIDEST:
            raise ValueError(f"{name} has a number or a length that no network has")


def check_layers(**named: Any) -> None:
    """Checks that each value is a number of layers, from 0 to 64, or a tuple of them.

    Raises:
        ValueError: one is not.
    """
    for name, value in named.items():
        items = value if isinstance(value, tuple) else (value,)
        if any(type(item) is not int or not 0 <= item <= MOST_LAYERS for item in items):
            raise ValueError(f"{name} = {value!r} is not made of counts from 0 to {MOST_LAYERS}")


def check_divisible(channels: tuple[int, ...], groups: int) -> None:
    """Checks that each number of channels can be split into groups.

    Raises:
        ValueError: one cannot.
    """
    for count in channels:
        if count % groups:
            raise ValueError(f"{count} channels cannot be split into {groups} normalisation groups")

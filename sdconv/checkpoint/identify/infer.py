"""Infers configs from shapes, and from the family where shapes leave something open."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdconv.checkpoint.identify.detected import DetectedNetwork, Shapes
from sdconv.checkpoint.identify.find import find_networks, main_network
from sdconv.checkpoint.identify.others import tiny_video
from sdconv.checkpoint.identify.refusals import (
    check_first_stage,
    check_halves,
    check_quant_convs,
    check_unet,
    not_found,
    under,
)
from sdconv.checkpoint.identify.shapes import BY_CONFIG, InferredConfig, NetworkShapes, collapsed
from sdconv.checkpoint.identify.statistics import (
    Statistics,
    statistics_in,
    tensors_of_statistics,
)
from sdconv.checkpoint.identify.tiny import TINY_FAMILIES, read_tiny
from sdconv.checkpoint.identify.unet import open_unet, read_unet
from sdconv.checkpoint.identify.vae import (
    Surroundings,
    check_family,
    check_kind,
    family_of_unets,
    misfit,
    open_vae,
    read_flux2,
    read_vae,
)
from sdconv.checkpoint.io.files import short
from sdconv.checkpoint.io.header import Header
from sdconv.checkpoint.io.write import CONFIG_KEY
from sdconv.config import (
    AutoencoderKLConfig,
    AutoencoderKLFlux2Config,
    AutoencoderTinyConfig,
    Config,
    UNet2DConditionConfig,
)
from sdconv.config.facts import VAE_FACTS
from sdconv.config.unet import UNET_FACTS
from sdconv.errors import (
    CheckpointError,
    InputError,
    SdconvError,
    SdconvWarning,
    UnknownNetworkError,
)

# the values that ``family=`` accepts
FAMILIES = tuple(dict.fromkeys((*VAE_FACTS, *UNET_FACTS, "flux2", *TINY_FAMILIES)))


@dataclass(frozen=True, kw_only=True)
class Identified(InferredConfig):
    """A network in a checkpoint, and its config.

    ``found``: where its tensors are. ``contradicted``: in words, the fields of a given config that
    the shapes contradict.
    """

    found: DetectedNetwork
    contradicted: tuple[str, ...] = ()

    @property
    def component(self) -> str:
        """``"vae"`` or ``"unet"``."""
        return self.found.component


def infer(
    shapes: Shapes | Header,
    *,
    metadata: Mapping[str, str] | None = None,
    family: str | None = None,
) -> dict[str, Config]:
    """Infers the configs of the networks in a checkpoint, from names and shapes alone.

    Args:
        shapes: name -> shape of every tensor, or what ``read_header(path)`` returns; in diffusers'
            or the original layout, with or without a prefix, among other tensors or alone.
        metadata: the file's own, which may name the family; a header has its own.
        family: the family, if the caller knows it (``"sd1"``, ``"sdxl"``, ``"flux1"``, ...).

    Returns:
        ``{"vae": config, "unet": config}``, or only one of them; frozen dataclasses with diffusers'
        field names.

    Raises:
        UnknownNetworkError: there is no network that sdconv knows, or there are two of one kind.
        WeightsMismatchError: a tensor that the config depends on is missing.
        InputError: the shapes or the metadata are not of this form, or the family is unknown or
            does not fit.

    Warns:
        SdconvWarning: the shapes fit several families that differ in, say, the scaling factor.
    """
    statistics: Statistics = statistics_in((), _checked_metadata(metadata), lambda name: None)
    if isinstance(shapes, Header):
        metadata = shapes.metadata if metadata is None else metadata
        statistics = _statistics_in(shapes)
        shapes = shapes.shapes
    identified = identify(shapes, metadata=metadata, family=family, statistics=statistics)
    for one in identified:
        warn_if_open(one)
    return {one.component: one.config for one in identified}


def identify(
    shapes: Shapes,
    *,
    networks: Sequence[DetectedNetwork] | None = None,
    metadata: Mapping[str, str] | None = None,
    family: str | None = None,
    component: str | None = None,
    prefix: str | None = None,
    config: Mapping[str, Any] | None = None,
    statistics: Statistics | None = None,
    where: object = None,
) -> list[Identified]:
    """Like ``infer``, but also returns where each network was found and what decided its family. It
    does not warn.

    Args:
        shapes, metadata, family: as for ``infer``.
        networks: what ``find_networks`` found among the shapes, if that is known already.
        component: the only one to identify; the others may then be of any kind.
        prefix: that of its names in the file, where there are several; None for the usual one.
        config: the content of a ``config.json`` next to the weights.
        statistics: the values of the file's ``edm_mean`` and ``edm_std``.
        where: the weights' name, for messages.
    """
    if family is not None and family not in FAMILIES:
        raise InputError(
            "unknown family", where="family", expected=", ".join(FAMILIES), got=repr(family)
        )
    shapes = _checked_shapes(shapes)
    metadata = _checked_metadata(metadata)
    everything = find_networks(shapes, where) if networks is None else networks
    found = [one for one in everything if component in (None, one.component)]
    if prefix is not None:
        found = under(found, prefix, where)
    if not found:
        raise not_found(shapes, everything, component, where)
    if component in (None, "vae") and prefix is None:
        check_first_stage(shapes, found, where)
    for name in sorted({one.component for one in found}):
        several = [one for one in found if one.component == name]
        chosen = main_network(several) if len(several) > 1 else several[0]
        if chosen is None:
            raise UnknownNetworkError(
                f"several networks that could be the {name}",
                where=where,
                expected="one",
                got=", ".join(
                    f"{one.kind} under {short(one.prefix or 'no prefix')}" for one in several
                ),
                hint="pass " + " or ".join(f"prefix={one.prefix!r}" for one in several[:4]),
            )
        found = [one for one in found if one.component != name or one is chosen]
        check_halves(chosen, several, shapes, where)
        check_quant_convs(chosen, everything, shapes, where)
    around = Surroundings(
        shapes=shapes, networks=everything, metadata=metadata, statistics=statistics or {}
    )
    result = []
    for one in found:
        if one.kind in ("AutoencoderKL", "AutoencoderKLFlux2"):
            check_kind(one, one.shapes(shapes), where)
        if one.component == "unet":
            check_unet(one, where)
        if one.kind == "AutoencoderTiny" and tiny_video(shapes, one.prefix):
            raise not_found(shapes, (), component, where)
        if given := dict(config or {}) or _config_in(metadata, one.component, where):
            result.append(_with_config(one, around, given, family, where))
        else:
            result.append(Identified(found=one, **vars(_read(one, around, family, where))))
    return result


def _checked_shapes(shapes: object) -> dict[str, tuple[int, ...]]:
    """Shapes by name; a shape may be a list of integers, as in JSON."""
    if not isinstance(shapes, Mapping):
        raise InputError(
            "not a mapping of shapes",
            where="shapes",
            expected="a mapping of tensor names to shapes, or what sdconv.read_header returns",
            got=short(shapes),
            hint="for a file: sdconv.infer(sdconv.read_header(path))",
        )
    for name, shape in shapes.items():
        if not (isinstance(name, str) and isinstance(shape, tuple | list) and _is_shape(shape)):
            raise InputError(
                "not a tensor's name and shape",
                where="shapes",
                expected="str names and tuples of integers",
                got=f"{short(name)}: {short(shape)}",
                hint="for a state dict: {name: tensor.shape for name, tensor in state.items()}",
            )
    return {name: tuple(shape) for name, shape in shapes.items()}


def _is_shape(shape: Iterable[object]) -> bool:
    return all(type(length) is int and length >= 0 for length in shape)


def _checked_metadata(metadata: object) -> Mapping[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping) or not all(
        isinstance(text, str) for pair in metadata.items() for text in pair
    ):
        raise InputError(
            "not a file's metadata",
            where="metadata",
            expected="a mapping of str to str, as sdconv.read_header(path).metadata is",
            got=short(metadata),
        )
    return metadata


def _config_in(metadata: Mapping[str, str], component: str, where: object) -> dict[str, Any]:
    """The component's config that sdconv wrote into a file's metadata; empty if there is none."""
    if CONFIG_KEY not in metadata:
        return {}
    try:
        content = json.loads(metadata[CONFIG_KEY])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"the config in the file's metadata is not JSON ({error})",
            where=where,
            expected=f"a JSON object under {CONFIG_KEY}",
            got=metadata[CONFIG_KEY][:80],
        ) from error
    if isinstance(content, dict) and {"vae", "unet"} & set(content):
        content = content.get(component)
    return content if isinstance(content, dict) else {}


def _with_config(
    found: DetectedNetwork,
    around: Surroundings,
    given: Mapping[str, Any],
    family: str | None,
    where: object,
) -> Identified:
    """Identifies a network by its given config, which is compared with the shapes."""
    name = given.get("_class_name", found.kind)
    if name != found.kind:
        raise UnknownNetworkError(
            f"the config of the {found.component} is for another class of network",
            where=where,
            expected=found.kind,
            got=name,
            hint="remove the config: it is then inferred from the shapes"
            if name in _CONFIGS
            else "run it with the library that has this class",
        )
    config = _CONFIGS[found.kind].from_json(given, where)
    if isinstance(config, UNet2DConditionConfig):
        found = found.with_label(config.addition_embed_type is not None)
    facts = VAE_FACTS.get(family or "")
    if isinstance(config, AutoencoderKLConfig) and family is not None:
        check_family(family, config.latent_channels)
    if isinstance(config, AutoencoderKLFlux2Config) and family not in (None, "flux2"):
        raise misfit(family, "a VAE with statistics of its latents", ("flux2",))
    if facts is not None and isinstance(config, AutoencoderKLConfig):
        own = config.scaling_factor == facts.scaling_factor and config.latents_mean is not None
        config = dataclasses.replace(
            config,
            scaling_factor=facts.scaling_factor,
            shift_factor=facts.shift_factor,
            latents_mean=config.latents_mean if own else facts.latents_mean,
            latents_std=config.latents_std if own else facts.latents_std,
        )
    try:
        read = _read(found, around, None, where)
        if config.open_to and family is not None and isinstance(config, UNet2DConditionConfig):
            config = _decided(config, _read(found, around, family, where).config)
    except InputError:
        raise
    except SdconvError:  # a network of an unknown shape, which only its config can describe
        read = None
    guess = _doubt_about(config, around) if family is None else None
    return Identified(
        found=found,
        config=config,
        family=family or _named_by(config, read),
        evidence=BY_CONFIG,
        open_to=config.open_to if family is None else (),
        guess=guess,
        contradicted=() if read is None else tuple(_contradicted(config, read.config)),
    )


def _decided(config: UNet2DConditionConfig, read: Config) -> UNet2DConditionConfig:
    """An open config with what the caller's family decides."""
    decided = {name: read[name] for name in ("attention_head_dim", "upcast_attention")}
    return dataclasses.replace(config, **decided)


def _doubt_about(config: Config, around: Surroundings) -> str | None:
    """Why a given config leaves the family open, in words that follow the component's name; None if
    it does not."""
    if isinstance(config, UNet2DConditionConfig):
        return open_unet(config) if config.open_to else None
    if not isinstance(config, AutoencoderKLConfig):
        return None
    if config.open_to:
        return open_vae(config)
    shown = family_of_unets(around)
    facts = VAE_FACTS.get(shown[0]) if shown else None
    if (
        shown is None
        or facts is None
        or facts.latent_channels != config.latent_channels
        or facts.scaling_factor == config.scaling_factor
        or config.latents_mean is not None
    ):
        return None
    return (
        f"has a config with scaling_factor {config.scaling_factor}, but {shown[1]}, as in "
        f"{shown[0]} (scaling_factor {facts.scaling_factor}); the config was taken: pass family= "
        "to decide"
    )


def _named_by(config: Config, read: InferredConfig | None) -> str:
    """The families that a config fits, by its scaling factor or else by its shapes."""
    if isinstance(config, AutoencoderKLFlux2Config):
        return "flux2"
    if not isinstance(config, AutoencoderKLConfig):
        return read.family if read is not None else "unknown"
    fitting = [
        name
        for name, facts in VAE_FACTS.items()
        if (config.scaling_factor, config.latent_channels)
        == (facts.scaling_factor, facts.latent_channels)
    ]
    return " or ".join(fitting) or "unknown"


def _contradicted(config: Config, read: Config) -> Iterator[str]:
    """The fields of a config that contradict the shapes, each in words."""
    for name in config.field_names():
        given, seen = config[name], read[name]
        if name not in config.beyond_shapes and collapsed(given) != collapsed(seen):
            yield f"{name} = {given!r} where the shapes say {seen!r}"


def warn_if_open(identified: Identified, *, stacklevel: int = 3) -> None:
    """Warns if neither the weights nor the caller determined the family.

    Args:
        stacklevel: as in ``warnings.warn``: 3 names the caller of the function that calls this one.
    """
    if identified.guess is not None:
        text = f"the {identified.component} {identified.guess}"
        warnings.warn(text, SdconvWarning, stacklevel=stacklevel)


def _read(
    found: DetectedNetwork,
    around: Surroundings,
    family: str | None,
    where: object,
) -> InferredConfig:
    own = NetworkShapes(found, around.shapes, where)
    match found.kind:
        case "AutoencoderKL":
            return read_vae(own, around, family)
        case "AutoencoderKLFlux2":
            return read_flux2(own, family)
        case "AutoencoderTiny":
            return read_tiny(own, family)
    return read_unet(own, around.metadata, family)


_CONFIGS: Mapping[str, type[Config]] = {
    "AutoencoderKL": AutoencoderKLConfig,
    "AutoencoderKLFlux2": AutoencoderKLFlux2Config,
    "AutoencoderTiny": AutoencoderTinyConfig,
    "UNet2DConditionModel": UNet2DConditionConfig,
}


def _statistics_in(header: Header) -> Statistics:
    """The values of a file's ``edm_mean`` and ``edm_std``; empty without them."""
    if tensors_of_statistics(header.tensors) is None:
        return statistics_in((), header.metadata, lambda name: None)
    from sdconv.checkpoint.io.source import open_source  # which imports torch

    with open_source(header.path) as source:
        return statistics_in(header.tensors, header.metadata, source.tensor)

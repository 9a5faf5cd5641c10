"""PEFT's config of an adapter: what its tensors do not tell, such as alpha."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from sdconv.checkpoint.io.files import os_errors, read_json, short
from sdconv.checkpoint.io.source import Source
from sdconv.checkpoint.open import Weights
from sdconv.errors import CheckpointError

CONFIG_FILE = "adapter_config.json"
_COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
_METADATA_KEY = "lora_adapter_metadata"

# PEFT's types that merge -> how roles of their tensors begin; and what messages call the others
_MERGED_TYPES: Mapping[str, str] = {
    "LORA": "up",
    "LOHA": "hada_",
    "LOKR": "lokr_",
    "OFT": "oft_R",
    "BOFT": "boft_R",
    "IA3": "ia3_l",
}
_TYPES: Mapping[str, str] = {"VERA": "VeRA"}
# options with which PEFT's layers compute something else
_OTHER_ARITHMETIC = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
)
# initialisations that also change the weights of the network, which such an adapter needs
_CHANGES_THE_NETWORK = ("pissa", "olora", "corda", "loftq", "lora_ga")


class AdapterConfig:
    """A config, from an adapter's folder, next to its file, or from the file's metadata.

    Args:
        content: the config; empty if there is none.
        where: the file's name in messages.

    Raises:
        CheckpointError: it asks for something that sdconv does not merge.
    """

    def __init__(self, content: Mapping[str, Any], where: str) -> None:
        self._content = content
        self._where = where
        kind = str(content.get("peft_type") or "LORA").upper()
        unsupported = [] if kind in _MERGED_TYPES else [_TYPES.get(kind, kind)]
        unsupported += [option for option in _OTHER_ARITHMETIC if content.get(option)]
        initial = str(content.get("init_lora_weights") or "").lower()
        if initial.startswith(_CHANGES_THE_NETWORK):
            unsupported.append(f"init_lora_weights={initial!r} (it changes the network's weights)")
        if unsupported:
            raise CheckpointError(
                f"its config says {' and '.join(unsupported)}, which sdconv does not merge",
                where=where,
                expected="LoRA, LoHa, LoKr, OFT, BOFT or (IA)3",
            )
        self._kind = kind
        self._alpha_name = "alpha" if kind in ("LOHA", "LOKR") else "lora_alpha"

    @classmethod
    def read(cls, lora: Weights, source: Source, component: str = "unet") -> Self:
        """The config of a LoRA file for a component, or an empty one."""
        return cls(_read(lora, source, component), source.label)

    def __bool__(self) -> bool:
        return bool(self._content)

    def check_roles(self, roles: Iterable[str]) -> None:
        """Checks that a file's tensors are of the type that the config names.

        Raises:
            CheckpointError: none is.
        """
        begins = _MERGED_TYPES[self._kind]
        if self._content.get("peft_type") and not any(r.startswith(begins) for r in roles):
            raise CheckpointError(
                f"its config says {self._kind}, of which it has no tensor",
                where=self._where,
                expected="the adapter's own config",
            )

    @property
    def gives_alpha(self) -> bool:
        """Whether it says anything about alpha."""
        return self._content.get(self._alpha_name) is not None

    @property
    def decomposes(self) -> bool:
        """Whether each layer must have DoRA's magnitude."""
        return bool(self._content.get("use_dora"))

    def option(self, name: str, default: Any = None) -> Any:
        """An option's value."""
        return self._content.get(name, default)

    def factor(self, layer: str, rank: int | None) -> float:
        """Alpha over rank, for rank-stabilised LoRA over its square root, as in PEFT; 1 without an
        alpha.

        Args:
            layer: the layer's name, which patterns may match.
            rank: the rank; None takes the config's own.
        """
        alpha = self._of_layer(self._content.get(self._alpha_name), "alpha_pattern", layer)
        if alpha is None:
            return 1.0
        if rank is None:
            rank = self._of_layer(self._content.get("r"), "rank_pattern", layer)
        try:
            factor = alpha / (math.sqrt(rank) if self._content.get("use_rslora") else rank)
            if not math.isfinite(factor):
                raise ValueError(factor)
        except (ArithmeticError, TypeError, ValueError) as error:
            raise self._invalid("alpha", layer, alpha, rank) from error
        return float(factor)

    def names(self, option: str, layer: str) -> bool:
        """Whether an option's value, a pattern or a list of names' ends, holds for a layer."""
        value = self._content.get(option) or ()
        try:
            if isinstance(value, str):
                return re.fullmatch(value, layer) is not None
            return any(layer == one or layer.endswith(f".{one}") for one in value)
        except (TypeError, re.error) as error:
            raise self._invalid(option, layer, value) from error

    def _of_layer(self, value: Any, patterns: str, layer: str) -> Any:
        """A value, or that of the first pattern that matches the layer's name."""
        given = self._content.get(patterns) or {}
        try:
            for pattern, own in given.items():
                if re.match(rf"(.*\.)?({pattern})$", layer):
                    return own
        except (AttributeError, TypeError, re.error) as error:
            raise self._invalid(patterns, layer, given) from error
        return value

    def _invalid(self, option: str, layer: str, *got: Any) -> CheckpointError:
        return CheckpointError(
            f"its config has no valid {option} for {layer}",
            where=self._where,
            expected="lora_alpha (or alpha) and r, numbers, alpha_pattern and rank_pattern, "
            "numbers by pattern",
            got=short(got),
        )


def _read(lora: Weights, source: Source, component: str) -> Mapping[str, Any]:
    if isinstance(lora, str | Path):
        path = Path(lora)
        with os_errors(path):
            file = path / CONFIG_FILE if path.is_dir() else path.with_name(CONFIG_FILE)
            # next to a file of another name, it may belong to another file
            is_pefts = path.name.partition(".")[0] == "adapter_model"  # also adapter_model.fp16
            exists = (path.is_dir() or is_pefts) and file.exists()
        if exists:
            return read_json(file)
    try:
        content = json.loads(source.metadata.get(_METADATA_KEY, "{}"))
        # names begin with the component: unet.lora_alpha
        others = tuple(f"{one}." for one in _COMPONENTS if one != component)
        return {
            k.removeprefix(f"{component}."): v
            for k, v in content.items()
            if not k.startswith(others)
        }
    except (AttributeError, RecursionError, ValueError) as error:
        raise CheckpointError(
            f"its metadata {_METADATA_KEY} is not a JSON object", where=source.label
        ) from error

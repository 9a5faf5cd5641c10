"""The mixin that makes a network usable as diffusers' model of the same name.

It has the methods with which pipelines and scripts open, save and measure a diffusers model, and it
lets pipelines recognise the network.
"""

from __future__ import annotations

import functools
import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import nn

from sdconv.backends import provided
from sdconv.checkpoint.assemble import assemble
from sdconv.checkpoint.io.files import as_path, read_json, short, weights_path
from sdconv.checkpoint.io.folder import DIFFUSERS_NAME, folder_at, variant_in
from sdconv.checkpoint.io.write import AVERAGING_FIELDS, write_config, write_folder
from sdconv.config import Config
from sdconv.errors import CheckpointError, InputError, SdconvWarning

# options of diffusers for the hub and for filling a model, which have no effect here
_IGNORED = frozenset(
    "cache_dir commit_hash force_download local_files_only low_cpu_mem_usage max_memory mirror"
    " offload_folder offload_state_dict proxies revision token trust_remote_code use_safetensors"
    " user_agent".split()
)
# options that change numbers, what is returned or where it computes, unless they are not set
_REFUSED = frozenset(
    "dduf_entries from_flax ignore_mismatched_sizes original_config output_loading_info"
    " parallel_config"
    " quantization_config return_unused_kwargs use_flashpack".split()
)


class _EqualToPeer(type):
    """The type of a class that equals diffusers' class ``_peer``, and has its hash."""

    _peer: type

    def __eq__(cls, other: object) -> bool:
        return (other._peer if isinstance(other, _EqualToPeer) else other) is cls._peer

    def __hash__(cls) -> int:
        return hash(cls._peer)


@functools.cache
def _equal_to(peer: type, cls: type) -> type:
    """The subclass of ``cls`` that equals ``peer``, and is otherwise the same."""
    fields = {"_peer": peer, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return _EqualToPeer(cls.__name__, (cls,), fields)


class _ModuleName(str):
    """The ``__module__`` of a network's class, which is ``"diffusers"`` for its instances.

    Pipelines read it when they take a component, and write it into ``model_index.json``: what they
    save opens without sdconv.
    """

    def __get__(self, network: DiffusersModel | None, owner: type | None = None) -> str:
        if network is None:
            return self
        own: type = type(network)
        peer = network._peer_class()
        if peer is not None and not isinstance(own, _EqualToPeer):
            vars(object)["__class__"].__set__(network, _equal_to(peer, own))
        return "diffusers"

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)  # a pickled class needs a plain string


class DiffusersModel(nn.Module):
    """A network that a diffusers pipeline moves, offloads, saves under diffusers' name for it, and
    accepts in ``from_pretrained(..., vae=network)`` and ``from_pipe``.

    Pipelines recognise a component by ``isinstance`` and by the name of its class. Once diffusers'
    class has been imported, ``network.__class__`` returns it, as a proxy does in Python;
    ``type(network)`` remains sdconv's. diffusers is never imported here.

    ``DiffusionPipeline.from_pipe`` asks for more: it keeps a component only if ``type(component)``
    equals a class in the new pipeline's signature. Equal classes must have equal hashes, and a
    class cannot change its hash once it is in use. So a network that a pipeline takes moves to a
    subclass of its own class, which is made for that purpose and equals diffusers' class in both
    respects. ``sdconv.AutoencoderKL`` itself equals no other class.

    ``config_class``: the config that it is built from. ``component``: its name in a checkpoint.
    """

    config_class: ClassVar[type[Config]]
    component: ClassVar[str]
    config: Config

    def __init__(self, config: Config) -> None:
        if not isinstance(config, self.config_class):
            raise InputError(
                "not a config of this network",
                where=type(self).__name__,
                expected=f"{self.config_class.__name__}, as sdconv.infer returns it",
                got=type(config).__name__,
                hint=f"{type(self).__name__}.from_config takes the content of a config.json",
            )
        super().__init__()
        self.config = config

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__module__ = _ModuleName(cls.__module__)

    if not TYPE_CHECKING:  # a type checker should see the network's own class

        @property
        def __class__(self) -> type:
            return self._peer_class() or type(self)

    def _peer_class(self) -> type | None:
        """diffusers' class of the same name, if it has been imported; None in torch.compile, which
        looks up attributes by ``__class__`` and must find those of sdconv's class.

        diffusers imports a class when it is asked for, which takes seconds. As long as none of its
        networks is imported, nobody can have a class to compare this one with.
        """
        if torch.compiler.is_compiling():
            return None
        homes = map(sys.modules.get, ("diffusers.models.autoencoders", "diffusers.models.unets"))
        peers = (getattr(home, self.config.class_name, None) for home in homes)
        return next((peer for peer in peers if isinstance(peer, type)), None)

    def __reduce__(self) -> tuple[Any, ...]:
        # __class__ is not what pickle would rebuild, and a subclass made above has no name to find
        own = type(self)
        return _rebuild, (own.__base__ if isinstance(own, _EqualToPeer) else own,), self.__dict__

    @classmethod
    def from_config(
        cls, config: Config | Mapping[str, Any] | str | Path, return_unused_kwargs: bool = False
    ) -> Any:
        """A network with torch's random weights.

        Args:
            config: sdconv's, the content of a ``config.json``, or the folder of one.
            return_unused_kwargs: also returns the fields that are not the network's, such as those
                of ``diffusers.training_utils.EMAModel``.

        Raises:
            InputError: it is none of these.
            CheckpointError: it does not describe this kind of network.
        """
        if isinstance(config, str | Path) and as_path(config).is_dir():
            config = cls.load_config(config)
        if not isinstance(config, Mapping):
            raise InputError(
                "not a config",
                where=f"{cls.__name__}.from_config",
                expected="a config, or the content of a config.json",
                got=type(config).__name__,
                hint="from_pretrained opens a path",
            )
        unused: dict[str, Any] = {}
        if not isinstance(config, cls.config_class):
            unused = {name: config[name] for name in AVERAGING_FIELDS if name in config}
            known = {name: value for name, value in config.items() if name not in unused}
            config = cls.config_class.from_json(known, "config")
        network = cls._build(config)
        return (network, unused) if return_unused_kwargs else network

    @classmethod
    def _build(cls, config: Any) -> Self:
        """A network for a config of its class."""
        return cls(config)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
        family: str | None = None,
        **options: Any,
    ) -> Self:
        """Opens a network like ``sdconv.load``, with diffusers' arguments; nothing is downloaded.

        Args:
            pretrained_model_name_or_path: a folder, or anything else that ``sdconv.load`` opens.
            subfolder: a folder in it, such as ``"vae"``.
            torch_dtype, dtype: as in diffusers, float32 if neither is given.
            variant: the word in the file's name, such as ``"fp16"``, if the folder has weights in
                that variant only.
            family: as for ``sdconv.load``.
            options: fields of the config overrule it, and so does ``config``, a ``config.json``,
                its folder or its content; ``device_map`` may name one device; ``disable_mmap``
                reads everything into memory. Those for the hub are accepted, and have no effect,
                like those that do not exist.

        Raises:
            InputError: an option is not supported, or the variant does not exist.
            SdconvError: as ``sdconv.load``.

        Warns:
            SdconvWarning: an option does not exist.
        """
        device = _one_device(options.pop("device_map", None))
        mmap = not options.pop("disable_mmap", False)
        given = {**_given_config(options.pop("config", None)), **options}
        fields = {k: given[k] for k in cls.config_class.field_names() if k in given}
        options = {k: v for k, v in options.items() if k not in fields}
        _refuse({name for name in _REFUSED & set(options) if options[name]}, "from_pretrained")
        if unknown := sorted(set(options) - _IGNORED - _REFUSED):
            what = f"from_pretrained ignores options that do not exist: {', '.join(unknown)}"
            warnings.warn(SdconvWarning(what), stacklevel=2)
        path: Any = pretrained_model_name_or_path
        if subfolder is not None:
            path = weights_path(path) / subfolder
        if variant is not None:
            path = _with_variant(weights_path(path), variant)
        return assemble(
            path,
            functools.partial(cls._build_from, path),
            component=cls.component,
            dtype=dtype or torch_dtype or torch.float32,
            device=device,
            family=family,
            mmap=mmap,
            fields=fields,
        )

    @classmethod
    def _build_from(cls, path: object, config: Config) -> Self:
        """A network for the config that was found under ``path``."""
        if not isinstance(config, cls.config_class):
            raise InputError(
                "another network than the one asked for",
                where=path if isinstance(path, str | Path) else None,
                expected=cls.__name__,
                got=config.class_name,
                hint="call from_pretrained of that class, or sdconv.load",
            )
        return cls._build(config)

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path_or_dict: Any, **options: Any) -> Self:
        """``from_pretrained`` for a single file or a state dict, in any layout."""
        return cls.from_pretrained(pretrained_model_link_or_path_or_dict, **options)

    @classmethod
    def load_config(
        cls, pretrained_model_name_or_path: str | Path, *, subfolder: str | None = None
    ) -> dict[str, Any]:
        """The content of a folder's ``config.json``.

        Raises:
            CheckpointError: it cannot be read.
        """
        folder = as_path(pretrained_model_name_or_path)
        return read_json(folder / (subfolder or "") / "config.json")

    def register_to_config(self, **fields: Any) -> None:
        """Changes fields of the config.

        Some pipelines change the VAE's scaling factor, and training scripts set all fields. The
        state of diffusers' ``EMAModel`` is kept apart, and saved with the config.

        Raises:
            InputError: a field does not exist, or this network cannot have its value.
        """
        fields = {name: value for name, value in fields.items() if not name.startswith("_")}
        averaging = {name: fields.pop(name) for name in AVERAGING_FIELDS if name in fields}
        if averaging:
            vars(self)["averaging"] = averaging
        kind = type(self.config)
        if unknown := set(fields) - set(self.config) - kind.unused:
            raise InputError(
                "unknown field",
                where="register_to_config",
                expected=f"fields of {kind.class_name}: {', '.join(self.config)}",
                got=", ".join(sorted(unknown)),
            )
        before = self.config
        try:
            self.config = kind.from_json({**before.to_json(), **fields}, "register_to_config")
        except CheckpointError as error:
            raise InputError("invalid config", where="register_to_config", got=error) from error
        if self.config.get("scaling_factor") != before.get("scaling_factor"):
            self.config = self.config.left_open(())  # the caller has decided

    def to_json_string(self) -> str:
        """The config as the text of a ``config.json``."""
        return json.dumps({**self.config.to_json(), **self._averaging}, indent=2) + "\n"

    def save_config(self, save_directory: str | Path) -> None:
        """Writes ``config.json`` into a folder, which is created if it does not exist.

        Raises:
            CheckpointError: it cannot be written.
        """
        write_config(self.config, as_path(save_directory), self._averaging)

    @property
    def _averaging(self) -> Mapping[str, Any]:
        """Fields of diffusers' ``EMAModel``, which it registers before it saves."""
        given: Mapping[str, Any] = vars(self).get("averaging", {})
        return given

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = "10GB",
        push_to_hub: bool = False,
        use_flashpack: bool = False,
        **options: Any,
    ) -> None:
        """Writes ``config.json`` and ``diffusion_pytorch_model[.variant].safetensors``, or its
        shards and their index.

        Args:
            save_directory: the component's folder; created if it does not exist.
            is_main_process: False writes nothing, because another process does.
            variant: a word for the file's name, such as ``"fp16"``.
            max_shard_size: most bytes of a file, or a size such as ``"5GB"``; None for one file.
            safe_serialization: False is answered with a warning: sdconv writes no pickles, and
                diffusers prefers safetensors when it opens a folder.
            push_to_hub, use_flashpack: not supported.
            save_function, options: have no effect, as in diffusers.

        Raises:
            InputError: an option is not supported.
            CheckpointError: the folder cannot be written.
        """
        if push_to_hub:
            raise InputError(
                "sdconv uploads nothing",
                where="save_pretrained(push_to_hub=True)",
                hint="leave push_to_hub out, and upload the folder with huggingface_hub: "
                "HfApi().upload_folder(folder_path=..., repo_id=...)",
            )
        _refuse({"use_flashpack"} if use_flashpack else set(), "save_pretrained")
        if not is_main_process:
            return
        if not safe_serialization:
            what = "safetensors are written, not pickles, whatever safe_serialization says"
            warnings.warn(SdconvWarning(what), stacklevel=2)
        write_folder(
            self.state_dict(),
            self.config,
            as_path(save_directory),
            variant=variant,
            max_shard_size=max_shard_size,
            extra=self._averaging,
        )

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of elements in its parameters.

        Args:
            only_trainable: count only parameters that require gradients.
            exclude_embeddings: leave out the weights of ``nn.Embedding``.
        """
        tables = {id(m.weight) for m in self.modules() if type(m) is nn.Embedding}
        return sum(
            parameter.numel()
            for parameter in self.parameters()
            if (parameter.requires_grad or not only_trainable)
            and not (exclude_embeddings and id(parameter) in tables)
        )

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """The bytes of its parameters, and of its buffers if ``return_buffers``."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.nbytes for tensor in tensors)

    def enable_group_offload(self, onload_device: torch.device, **options: Any) -> None:
        """Keeps parts of the network on ``onload_device`` only while they compute.

        This is diffusers' ``apply_group_offloading``, whose documentation explains the options; it
        imports diffusers.
        """
        provided("diffusers").apply_group_offloading(self, onload_device, **options)

    # Names of modules that diffusers keeps in float32, or leaves out of layerwise casting.
    _keep_in_fp32_modules: Sequence[str] | None = None
    _skip_layerwise_casting_patterns: Sequence[str] | None = None

    def enable_layerwise_casting(
        self,
        storage_dtype: torch.dtype = torch.float8_e4m3fn,
        compute_dtype: torch.dtype | None = None,
        skip_modules_pattern: tuple[str, ...] | None = None,
        skip_modules_classes: tuple[type[nn.Module], ...] | None = None,
        non_blocking: bool = False,
    ) -> None:
        """Stores each layer's weights in one dtype, and converts them to another while it computes.

        This is diffusers' method of the same name, with the same numbers; it imports diffusers, and
        cannot be undone. The fast backend leaves such layers to the reference.

        Args:
            storage_dtype: of the weights at rest.
            compute_dtype: of the layers' inputs and outputs; None for the network's dtype.
            skip_modules_pattern: regular expressions for names of modules that keep their dtype;
                None for diffusers' own, such as ``norm``.
            skip_modules_classes: classes of modules that keep their dtype.
            non_blocking: conversions do not wait for the device.
        """
        provided("diffusers").ModelMixin.enable_layerwise_casting(
            self,
            storage_dtype,
            compute_dtype,
            skip_modules_pattern,
            skip_modules_classes,
            non_blocking,
        )

    def set_attention_backend(self, backend: str) -> None:
        """Chooses diffusers' implementation of attention, by its name there; imports diffusers.

        A U-Net's transformers use it if their attention processors do. An autoencoder's attention
        does not, in diffusers either.
        """
        provided("diffusers").ModelMixin.set_attention_backend(self, backend)

    def reset_attention_backend(self) -> None:
        """Undoes ``set_attention_backend``; imports diffusers."""
        provided("diffusers").ModelMixin.reset_attention_backend(self)


def _rebuild(cls: type[DiffusersModel]) -> DiffusersModel:
    return cls.__new__(cls)


def _refuse(options: set[str], method: str) -> None:
    if options:
        raise InputError(
            "options that sdconv does not support",
            where=method,
            got=", ".join(sorted(options)),
            hint="leave them out",
        )


def _given_config(config: Any) -> Mapping[str, Any]:
    """The content of the config that a caller names."""
    if config is None or isinstance(config, Mapping):
        return config or {}
    path = as_path(config)
    if not path.exists():
        raise InputError(
            "this config is not on this machine, and nothing is downloaded here",
            where="config",
            expected="a config.json, its folder, or its content",
            got=short(config),
            hint="leave config out: it is inferred from the weights' shapes; family= decides the "
            "rest",
        )
    return read_json(path / "config.json" if path.is_dir() else path)


def _one_device(device_map: Any) -> str | torch.device:
    """The device that a ``device_map`` names for everything."""
    if isinstance(device_map, Mapping) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map is None:
        return "cpu"
    if isinstance(device_map, int) and not isinstance(device_map, bool):
        return f"cuda:{device_map}"
    if isinstance(device_map, torch.device) or (
        isinstance(device_map, str) and not device_map.startswith(("auto", "balanced", "seq"))
    ):
        return device_map
    raise InputError(
        "sdconv does not spread a network over devices",
        where="device_map",
        expected="one device, such as 'cuda'",
        got=short(device_map),
    )


def _with_variant(path: Path, variant: str) -> Path:
    """The file or the index of a folder's weights in a variant."""
    folder = folder_at(path)
    found = None if folder is None else variant_in(folder, variant)
    if found is None:
        raise InputError(
            "unknown variant",
            where=path,
            expected=f"{DIFFUSERS_NAME}.{variant}.safetensors",
            hint="leave variant out: sdconv then reads the weights that the folder has",
        )
    return found

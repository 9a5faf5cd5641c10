"""sdconv's autoencoders in diffusers' pipelines: created, run, saved, loaded, moved, offloaded."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import seeded, unets
from helpers.numbers import randn
from helpers.pipelines import pipeline, run

import sdconv

CONFIGS = {"kl": seeded.SMALL_KL, "tiny": seeded.SMALL_TINY}


def network(kind: str) -> Any:
    """sdconv's network with its own copy of the weights, which a test may change."""
    return copy.deepcopy(seeded.network(CONFIGS[kind]))


def diffusers_twin(ours: Any) -> Any:
    """diffusers' own network with the same weights."""
    import diffusers

    fields = {k: v for k, v in ours.config.items() if k not in type(ours.config).extensions}
    fields.pop("block_out_channels" if "num_encoder_blocks" in fields else "", None)
    kind = getattr(diffusers, ours.config.class_name)
    known = signature(kind).parameters  # of this version
    fields = {k: v for k, v in fields.items() if k in known or v is not None}
    theirs = kind(**fields).eval()
    theirs.load_state_dict(ours.state_dict())
    return theirs


SIZE = {"height": 40, "width": 24}


@pytest.mark.parametrize("kind", ["kl", "tiny"])
@pytest.mark.parametrize(
    ("task", "given"),
    [("text", SIZE), ("image", {"image": torch.linspace(0, 1, 3 * 40 * 24).view(1, 3, 40, 24)})],
)
def test_pipelines_give_the_same_pixels(kind: str, task: str, given: dict[str, Any]) -> None:
    ours, other = network(kind), network(kind)
    with torch.no_grad():
        next(other.decoder.parameters()).add_(0.1)
    expected = run(pipeline(task, vae=diffusers_twin(ours)), task, **given)
    assert run(pipeline(task, vae=ours), task, **given) == expected
    assert run(pipeline(task, vae=other), task, **given) != expected


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_save_pretrained_and_from_pretrained(kind: str, tmp_path: Path) -> None:
    import diffusers

    ours = network(kind)
    pipe = pipeline("text", vae=ours)
    expected = run(pipe, "text", **SIZE)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", ours.config.class_name]
    # the folder opens without sdconv, with sdconv's network passed in, and as a component
    opened = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    given = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, vae=ours)
    alone = sdconv.load(tmp_path, component="vae")
    assert type(opened.vae) is getattr(diffusers, ours.config.class_name)
    assert given.vae is ours and type(given.vae) is type(ours)
    assert alone.config == ours.config
    for one in (opened, given):
        one.set_progress_bar_config(disable=True)
        assert run(one, "text", **SIZE) == expected


@pytest.mark.slow
def test_diffusers_is_imported_for_transformers_only_and_accepts_networks_loaded_before(
    tmp_path: Path,
) -> None:
    files = [str(tmp_path / f"{name}.safetensors") for name in ("vae", "unet")]
    sdconv.save(network("kl"), files[0])
    sdconv.save(unets.ours(unets.theirs(unets.small("one level"))), files[1])
    code = f"""
import sys, sdconv
vae = sdconv.load({files[0]!r})
config = sdconv.infer(sdconv.read_header({files[1]!r}).shapes)["unet"]
skeleton = sdconv.UNet2DConditionModel(config, transformers=None)
assert "diffusers" not in sys.modules and type(vae) is vae.__class__
unet = sdconv.load({files[1]!r})
assert "diffusers" in sys.modules
import diffusers
for ours in (vae, unet):
    name = ours.config.class_name
    assert isinstance(ours, getattr(diffusers, name)) and isinstance(ours, getattr(sdconv, name))
assert type(vae) is sdconv.AutoencoderKL
assert skeleton.state_dict().keys() < unet.state_dict().keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_network_that_diffusers_cannot_build_is_not_saved(tmp_path: Path) -> None:
    ours = sdconv.AutoencoderTiny(replace(seeded.SMALL_TINY, use_midblock_gn=True))
    with pytest.raises(sdconv.SdconvError, match="cannot represent"):
        pipeline("text", vae=ours).save_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_copies_and_pickles(kind: str) -> None:
    import diffusers  # with it __class__ and type() differ, which pickle does not expect

    ours = network(kind)
    assert isinstance(ours, getattr(diffusers, ours.config.class_name))
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is type(ours) and other.config == ours.config
        assert all(
            torch.equal(a, b) for a, b in zip(ours.parameters(), other.parameters(), strict=True)
        )


def test_offload_hooks_run_before_encode_and_decode() -> None:
    class Hook:
        calls = 0

        def pre_forward(self, module: torch.nn.Module) -> None:
            self.calls += 1

    for kind in ("kl", "tiny"):
        ours = network(kind)
        ours._hf_hook = Hook()
        with torch.no_grad():
            ours.encode(torch.zeros(1, 3, 16, 16))
            ours.decode(torch.zeros(1, 4, 8, 8))
        assert ours._hf_hook.calls == 2


def test_offloaded_by_accelerate() -> None:
    from accelerate import cpu_offload_with_hook

    ours = network("kl")
    z = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        expected = ours.decode(z).sample
        _, hook = cpu_offload_with_hook(ours, execution_device="cpu")
        assert torch.equal(ours.decode(z).sample, expected)
    hook.remove()


def test_changed_dtype_in_a_pipeline() -> None:
    pipe = pipeline("text", vae=network("kl"))
    pipe.vae.to(torch.float64)
    assert pipe.vae.dtype == torch.float64 and pipe.vae.device == torch.device("cpu")


def test_flux2_pipeline_reads_the_statistics() -> None:
    from diffusers import Flux2Pipeline

    ours: Any = seeded.network(seeded.flux2((32, 32)))
    theirs = diffusers_twin(ours)
    image = randn(1, 3, 16, 16)
    encode = Flux2Pipeline._encode_vae_image
    patchify = staticmethod(Flux2Pipeline._patchify_latents)
    results = []
    for vae in (ours, theirs):
        host = type("Host", (), {"vae": vae, "_patchify_latents": patchify})
        with torch.no_grad():
            results.append(encode(host(), image, torch.Generator().manual_seed(0)))
    assert torch.equal(*results)

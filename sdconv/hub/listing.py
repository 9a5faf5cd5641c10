"""Which files of a folder on the hub are its weights."""

from __future__ import annotations

from sdconv.errors import InputError
from sdconv.hub.errors import HubFile

_NAME = "diffusion_pytorch_model"
_PIPELINE = "model_index.json"


def weights_in(folder: HubFile) -> list[str]:
    """The files to download of a folder on the hub, the one that ``sdconv.load`` opens first.

    Args:
        folder: ``file`` is the folder's path, ``""`` for the root.

    Raises:
        InputError: the folder holds no safetensors weights, or several and none has diffusers'
            name, or it is a pipeline's.
    """
    from huggingface_hub.hf_api import HfApi, RepoFile

    listed = list(
        HfApi().list_repo_tree(
            folder.repository, folder.file or None, revision=folder.revision, recursive=False
        )
    )
    files = {one.path.rpartition("/")[2]: one.path for one in listed if isinstance(one, RepoFile)}
    folders = sorted(one.path for one in listed if not isinstance(one, RepoFile))
    weights = sorted(name for name in files if name.endswith(".safetensors"))
    index, whole = f"{_NAME}.safetensors.index.json", f"{_NAME}.safetensors"
    if whole in files:
        chosen = [whole]
    elif index in files:
        chosen = [index, *(name for name in weights if name.startswith(f"{_NAME}-"))]
    elif len(weights) == 1 and _PIPELINE not in files:
        chosen = weights
    else:
        raise _unclear(folder, weights, folders, _PIPELINE in files)
    chosen += ["config.json"] if "config.json" in files else []
    return [files[name] for name in chosen]


def _unclear(
    folder: HubFile, weights: list[str], folders: list[str], is_pipeline: bool
) -> InputError:
    what = "is a pipeline" if is_pipeline else "holds several files of weights"
    if not weights and not is_pipeline:
        what = "holds no safetensors weights"
    choices = [f"{folder.file}/{name}".lstrip("/") for name in weights]
    choices = folders if is_pipeline and folders else choices or folders
    named = f"{folder.repository}:{choices[0]}" if choices else f"{folder.repository}:FILE"
    return InputError(
        what,
        where=folder,
        expected="a file, or a folder with the weights of one network",
        got=", ".join(choices) or "nothing of either kind",
        hint=f"name one of them: {named}",
    )

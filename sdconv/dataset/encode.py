"""``sdconv.dataset.encode``: the latents of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdconv.dataset.encoder import Encoder, Settings
from sdconv.dataset.run import Options, Progress, Summary, make_dataset


def encode(
    source: str | Path,
    model: str | Path | Sequence[str | Path] | Encoder,
    out: str | Path,
    settings: Settings | None = None,
    options: Options | None = None,
    *,
    progress: Progress = lambda *_: None,
) -> Summary:
    """Encodes the images of a data set, or those that are not encoded yet.

    It can be killed at any moment and started again: the folder ends up byte for byte as that of
    one run. Images that cannot be read go to ``quarantine.jsonl``. Called again later, it encodes
    new images, and changed ones again.

    Args:
        source: a folder, webdataset tars, or a list of paths: see ``sources.find_images``.
        model: files of the autoencoder, as ``sdconv.load`` takes them; or an ``Encoder``, whose
            settings count.
        out: the folder to write.
        settings: what the latents are. options: how the work is done.
        progress: see ``Progress``.

    Raises:
        InputError: an argument is not valid, ``out`` holds something else, or was made with another
            model or other settings.
        SdconvError: a file cannot be read or written, a worker was killed again and again, or with
            ``on_error="fail"`` an image cannot be encoded.
    """
    work = model if isinstance(model, Encoder) else Encoder(model, settings)
    return make_dataset("latents", source, out, work, options or Options(), progress)

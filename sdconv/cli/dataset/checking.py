"""`sdconv dataset status` and `verify`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sdconv.cli.common import Json, print_json, say
from sdconv.cli.dataset.making import reasons
from sdconv.cli.dataset.options import Folder
from sdconv.cli.dataset.progress import progress_of
from sdconv.sizes import in_bytes


def status(folder: Folder, as_json: Json = False) -> None:
    """Show how far a data set is, and what is in it.

    \b
    Examples:
      sdconv dataset status latents
      sdconv dataset status latents --json
    """
    from sdconv.dataset import status as status_of

    found = status_of(folder)
    if as_json:
        buckets = {f"{rows}x{columns}": count for (rows, columns), count in found.buckets.items()}
        print_json(
            {
                "complete": found.complete,
                "shards": found.shards,
                "done": found.done,
                "stale": found.stale,
                "images": found.images,
                "encoded": found.encoded,
                "bytes": found.bytes,
                "quarantined": found.quarantined,
                "buckets": buckets,
                "about": found.about,
            }
        )
        return
    about = found.about
    rows = [
        ("shards", f"{found.done} of {found.shards}, {in_bytes(found.bytes)}"),
        ("images", f"{found.encoded} of {found.images}"),
        ("quarantine", reasons(found.quarantined)),
        ("buckets", _buckets(found.buckets)),
        ("layout", about["layout"]),
        ("model", f"{about['model']['class']}, sha256 {about['model']['sha256'][:16]}"),
        (about["name"], _settings(about[about["name"]])),
        ("images are", _settings(about["preprocessing"])),
    ]
    if found.stale:
        rows.insert(1, ("to be made again", f"{found.stale} shards, whose images have changed"))
    for name, words in rows:
        typer.echo(f"{name:<17} {words}")


def verify(
    folder: Folder,
    discard: Annotated[
        bool,
        typer.Option(
            "--discard", help="Remove damaged shards, so that the next run makes them again."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Read every shard again: hashes, keys and counts, shapes, finite values.

    The exit status is 1 if anything is wrong. Shards that are not made yet are not wrong.

    \b
    Examples:
      sdconv dataset verify latents
      sdconv dataset verify latents --discard
    """
    from sdconv.dataset import verify as verify_all

    with progress_of("shards") as progress:
        found = verify_all(folder, discard=discard, progress=progress)
    if as_json:
        print_json(
            {
                "shards": found.shards,
                "samples": found.samples,
                "bytes": found.bytes,
                "unfinished": found.unfinished,
                "problems": [{"shard": number, "what": words} for number, words in found.problems],
            }
        )
    else:
        for number, words in found.problems:
            typer.echo(words if number is None else f"shard {number}: {words}")
        unfinished = f"; {found.unfinished} shards are not made yet" if found.unfinished else ""
        count = len(found.problems)
        problems = "1 problem" if count == 1 else f"{count} problems"
        verdict = problems if count else "all is well"
        typer.echo(
            f"{folder}: {found.samples} samples in {found.shards} shards, "
            f"{in_bytes(found.bytes)}: {verdict}{unfinished}"
        )
    if found.problems:
        if not discard and not as_json:
            say("remove damaged shards with --discard, and run the data set again", "hint")
        raise typer.Exit(1)


def _buckets(buckets: dict[tuple[int, int], int]) -> str:
    shown = [f"{rows}x{columns} ({n})" for (rows, columns), n in list(buckets.items())[:8]]
    return ", ".join(shown) + (f" and {len(buckets) - 8} more" if len(buckets) > 8 else "")


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value}" for name, value in settings.items() if not isinstance(value, dict)
    )

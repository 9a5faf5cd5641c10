"""`sdconv dataset`: the latents and features of many images, as shards."""

from __future__ import annotations

import typer

from sdconv.cli.dataset import checking, making
from sdconv.cli.ending import Commands
from sdconv.cli.verbosity import with_verbosity

app = typer.Typer(cls=Commands, no_args_is_help=True, rich_markup_mode=None)

for command in (making.encode, making.features, checking.status, checking.verify):
    app.command()(with_verbosity(command))


@app.callback()
def dataset() -> None:
    """Latents and features of many images, as shards that can be resumed, extended and checked."""

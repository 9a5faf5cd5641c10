"""The commands, run as a user runs them."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from sdconv.cli import app


def run(*arguments: object) -> Result:
    """What a command answered; an exception that got out of it gets out of here."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result

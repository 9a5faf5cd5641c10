"""The commands, run as a user runs them."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import typer.main
import typer.testing
from typer.testing import CliRunner, Result

from sdconv.cli import app

# the runner would build all commands anew in each run
vars(typer.testing)["_get_command"] = cache(typer.main.get_command)


def run(*arguments: object) -> Result:
    """The result of a command. An exception that it does not handle is raised here."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def answer(*arguments: object, status: int = 0) -> Any:
    """The JSON that a command prints."""
    result = run(*arguments, "--json")
    assert result.exit_code == status, result.stderr
    return json.loads(result.stdout)

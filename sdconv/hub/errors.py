"""Translates every exception of the hub's client into an error that says what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sdconv.errors import SdconvError, SdconvWarning

# The hub's client only warns, with these words, and then fills the disk.
DISK_TOO_SMALL = "Not enough free disk space"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_PLACE = (errno.EEXIST, errno.EISDIR, errno.ENOTDIR)


class FetchError(SdconvError):
    """A file could not be downloaded whole. No broken file is left under its name."""


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """A file on the hub. ``label``: what messages call it. ``gated``: whether it is known to be
    given only to users who accepted its terms."""

    repository: str
    file: str
    label: str
    revision: str | None = None
    gated: bool = False

    def __str__(self) -> str:
        return self.label


@contextmanager
def hub_errors(wanted: HubFile) -> Iterator[None]:
    """Translates any exception of the hub's client into an error that says what to do.

    The client raises its own errors, its HTTP library's, the operating system's and those of its
    compiled downloader; Exception is their only common base.
    """
    try:
        yield
    except (SdconvError, SdconvWarning):
        raise
    except Exception as error:
        raise _explain(wanted, error) from error


def _explain(wanted: HubFile, error: Exception) -> FetchError:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    page = f"{constants.ENDPOINT}/{wanted.repository}"
    got = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)

    def failed(what: str, hint: str) -> FetchError:
        return FetchError(what, where=wanted, got=got, hint=hint)

    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        code = error.response.headers.get("X-Error-Code")
        if status in (401, 403) and (wanted.gated or code == "GatedRepo"):
            return failed(
                "the hub gives this file only to users who accepted its terms",
                f"accept them at {page}, log in with `hf auth login` or set HF_TOKEN, and fetch it "
                "again",
            )
        if status in (401, 403):
            return failed(
                "the hub refuses access: the repository is private or gone, or the token invalid",
                f"look at {page}; log in again with `hf auth login`, or unset HF_TOKEN",
            )
        if status == 404:
            return failed("the hub has no such file", f"it may have moved: look at {page}")
        return failed(f"the hub answered with HTTP status {status}", "try again later")
    if isinstance(error, OfflineModeIsEnabled):
        return failed(
            "offline mode is on, and there is no earlier download",
            "unset HF_HUB_OFFLINE, or pass the path of a file that you have",
        )
    number = error.errno if isinstance(error, OSError) else None
    if number in _DISK_FULL or str(error).startswith(DISK_TOO_SMALL):
        return failed("the disk is full", "free some space, or choose another directory or HF_HOME")
    if number in (*_NO_ACCESS, *_NO_PLACE):
        return failed("cannot be read or written there", "choose another directory or HF_HOME")
    return failed(
        "the hub could not be reached, or the connection was cut; no partial file was left",
        f"check your network and that {constants.ENDPOINT} is a hub, and fetch it again",
    )

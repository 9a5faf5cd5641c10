"""A small server on 127.0.0.1 with the part of the hub's protocol that downloads use.

As on the hub, one origin answers for repositories and redirects to another, the store, which serves
the bytes:

- ``HEAD /{owner}/{name}/resolve/{revision}/{file}``: a redirect stating commit, size and sha256;
- ``POST /api/models/{owner}/{name}/paths-info/{revision}``: the repository's listing;
- ``GET /api/models/{owner}/{name}/tree/{revision}[/{folder}]``: what is directly in a folder;
- ``GET /{owner}/{name}/{file}``, at the store: the bytes, whole or from a ``Range`` on.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)")
_STORED = re.compile(r"/([^/]+/[^/]+)/(.+)")
_TREE = re.compile(r"/api/models/([^/]+/[^/]+)/tree/[^/?]+(?:/([^?]*))?(?:\?.*)?")
_PATHS_INFO = re.compile(r"/api/models/([^/]+/[^/]+)/paths-info/[^/]+")


@dataclass
class HubFile:
    """One file: its bytes, and what the hub states about it."""

    content: bytes
    sha256: str = ""
    size: int = 0
    etag: str = ""
    listed: bool = True

    def __post_init__(self) -> None:
        self.sha256 = self.sha256 or hashlib.sha256(self.content).hexdigest()
        self.size = self.size or len(self.content)
        self.etag = self.etag or self.sha256

    @classmethod
    def small(cls, content: bytes) -> HubFile:
        """A file that the repository holds itself, whose ETag is git's hash of a blob."""
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return cls(content, etag=git, listed=False)

    def entry(self, name: str) -> dict[str, Any]:
        """Its entry in the repository's listing."""
        entry = {"type": "file", "path": name, "size": self.size, "oid": "0" * 40}
        lfs = {"oid": self.sha256, "size": self.size, "pointerSize": 134}
        return {**entry, "lfs": lfs} if self.listed else entry


@dataclass
class Hub:
    """What the server has, what it refuses, and the requests it got.

    ``refused``: repository -> (status, the hub's error code). ``cuts``: the numbers of bytes that
    the next downloads send before the connection drops. ``ranges``: the ``Range`` header, or None,
    of every request for bytes so far.
    """

    files: dict[tuple[str, str], HubFile] = field(default_factory=dict)
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    ranges: list[str | None] = field(default_factory=list)
    endpoint: str = ""
    store: str = ""

    def clear(self) -> None:
        """Empty the hub; its address stays."""
        for held in (self.files, self.refused, self.cuts, self.ranges):
            held.clear()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    timeout = 10

    def do_HEAD(self) -> None:
        match = _RESOLVE.fullmatch(urllib.parse.unquote(self.path))
        if match is None:
            return self._answer(404, {})
        repository, name = match.groups()
        if repository in self.hub.refused:
            status, code = self.hub.refused[repository]
            return self._answer(status, {"X-Error-Code": code} if code else {})
        file = self.hub.files.get((repository, name))
        if file is None:
            return self._answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        headers = {
            "Location": f"{self.hub.store}/{repository}/{urllib.parse.quote(name)}",
            "X-Repo-Commit": COMMIT,
            "X-Linked-ETag": f'"{file.etag}"',
            "X-Linked-Size": str(file.size),
        }
        return self._answer(302, headers)

    def do_POST(self) -> None:
        match = _PATHS_INFO.fullmatch(self.path)
        self.rfile.read(int(self.headers["Content-Length"]))
        if match is None:
            return self._answer(404, {})
        listing = [
            file.entry(name)
            for (repository, name), file in self.hub.files.items()
            if repository == match[1]
        ]
        return self._answer(200, {"Content-Type": "application/json"}, json.dumps(listing).encode())

    def _tree(self, repository: str, folder: str) -> None:
        if repository in self.hub.refused:
            status, code = self.hub.refused[repository]
            return self._answer(status, {"X-Error-Code": code} if code else {})
        start = f"{folder}/" if folder else ""
        listing, folders = [], set()
        for (owner, name), file in self.hub.files.items():
            if owner == repository and name.startswith(start):
                here, _, below = name.removeprefix(start).partition("/")
                if below:
                    folders.add(start + here)
                else:
                    listing.append(file.entry(name))
        listing += [{"type": "directory", "path": one, "oid": "0" * 40} for one in sorted(folders)]
        if not listing:
            return self._answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        return self._answer(200, {"Content-Type": "application/json"}, json.dumps(listing).encode())

    def do_GET(self) -> None:
        if tree := _TREE.fullmatch(self.path):
            return self._tree(tree[1], urllib.parse.unquote(tree[2] or ""))
        match = _STORED.fullmatch(urllib.parse.unquote(self.path))
        file = self.hub.files.get((match[1], match[2])) if match else None
        if file is None:  # the client asks for other things too
            return self._answer(404, {})
        asked = self.headers.get("Range")
        self.hub.ranges.append(asked)
        start = 0 if asked is None else int(asked.removeprefix("bytes=").rstrip("-"))
        body, total = file.content[start:], len(file.content)
        headers = {} if asked is None else {"Content-Range": f"bytes {start}-{total - 1}/{total}"}
        cut = self.hub.cuts.pop(0) if self.hub.cuts else len(body)
        headers["Content-Length"] = str(len(body))
        return self._answer(200 if asked is None else 206, headers, body[:cut])

    def _answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)  # the connection closes after it: this is HTTP/1.0

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve ``hub`` within the block; sets ``endpoint`` (for ``HF_ENDPOINT``) and ``store``."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
    hub.endpoint, hub.store = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, args=(0.05,)) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join(timeout=5)

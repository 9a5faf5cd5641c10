"""``sdconv.fetch`` with a local server that speaks the hub's protocol.

The calls run in another process, because the hub's client reads ``HF_ENDPOINT`` and ``HF_HOME``
only when it is imported. One process serves all calls except those that need other variables.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.hub_server import Hub, HubFile, serve

from sdconv.errors import InputError
from sdconv.hub.download import fetch
from sdconv.hub.manifest import load_manifest

NAME = "taesd"
GATED = "flux1-vae"
# The client writes to the disk in pieces of this size; only whole ones survive a cut connection.
PIECE = 10 * 1024 * 1024

CALLS = """
import json, sys, warnings
from sdconv import SdconvError, fetch
from sdconv.hub.names import weights_named
for line in sys.stdin:
    name, directory, overwrite, find, revision = json.loads(line)
    answer = {}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            if find:
                answer["path"] = str(weights_named(name))
            else:
                answer["path"] = str(fetch(
                    name,
                    directory=directory,
                    overwrite=overwrite,
                    progress=False,
                    revision=revision,
                ))
        except SdconvError as error:
            answer["error"] = f"{type(error).__name__}: {error}"
    answer["warnings"] = [str(warning.message) for warning in warned]
    print(json.dumps(answer), flush=True)
"""


@dataclass(frozen=True)
class Answer:
    """The result of one call of ``fetch``: a path or an error, and warnings."""

    path: str = ""
    error: str = ""
    warnings: tuple[str, ...] = ()


@dataclass
class Client:
    """Calls ``fetch`` against ``hub``, with a cache in ``home``."""

    hub: Hub
    home: Path

    def start(self, **env: str) -> subprocess.Popen[str]:
        ours = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_"))}
        ours |= {"HF_ENDPOINT": self.hub.endpoint, "HF_HOME": str(self.home), "NO_PROXY": "*"}
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", CALLS]
        return subprocess.Popen(command, env={**ours, **env}, stdin=pipe, stdout=pipe, text=True)

    def call(
        self,
        name: str,
        directory: Path | None = None,
        overwrite: bool = False,
        find: bool = False,
        revision: str | None = None,
        **env: str,
    ) -> Answer:
        folder = None if directory is None else str(directory)
        question = json.dumps([name, folder, overwrite, find, revision])
        if env:
            with self.start(**env) as process:
                line, _ = process.communicate(question, timeout=30)
        else:
            assert self.process.stdin is not None and self.process.stdout is not None
            print(question, file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        answer = json.loads(line)
        return Answer(**{**answer, "warnings": tuple(answer["warnings"])})

    def __enter__(self) -> Client:
        self.process = self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate(timeout=30)

    def path(self, name: str, directory: Path | None = None, **env: str) -> Path:
        answer = self.call(name, directory, **env)
        assert answer.error == ""
        assert answer.warnings == ()
        return Path(answer.path)

    def error(self, name: str, directory: Path | None = None, **env: str) -> str:
        answer = self.call(name, directory, **env)
        assert answer.error.startswith("FetchError: "), answer
        return answer.error

    def weights(self) -> list[Path]:
        """Every file in the cache that holds downloaded bytes, complete or not."""
        held = [p for p in self.home.glob("hub/models--*/*/**/*") if p.is_file() or p.is_symlink()]
        return [p for p in held if p.parent.name != "refs"]


def noise(size: int) -> bytes:
    return random.Random(7).randbytes(size)


def repository(name: str = NAME) -> tuple[str, str]:
    known = load_manifest()[name]
    return known.repository, known.file


@pytest.fixture(scope="module")
def shared_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    home = tmp_path_factory.mktemp("home")
    with serve(Hub()) as hub, Client(hub, home) as client:
        yield client


@pytest.fixture
def client(shared_client: Client) -> Client:
    """A hub with one file and no recorded requests, and an empty cache."""
    shutil.rmtree(shared_client.home / "hub", ignore_errors=True)
    shared_client.hub.clear()
    shared_client.hub.files[repository()] = HubFile(noise(100_000))
    return shared_client


def test_a_download_is_whole_and_a_second_call_asks_for_no_bytes(client: Client) -> None:
    path = client.path(NAME)
    assert path.read_bytes() == noise(100_000)
    assert path.name == repository()[1]
    assert path.is_relative_to(client.home)
    assert client.hub.ranges == [None]

    assert client.path(NAME) == path
    assert client.hub.ranges == [None]


def test_a_directory_gets_the_file_below_its_name(client: Client, tmp_path: Path) -> None:
    path = client.path(NAME, tmp_path / "weights")
    assert path == tmp_path / "weights" / NAME / repository()[1]
    assert path.read_bytes() == noise(100_000)

    assert client.path(NAME, tmp_path / "weights") == path
    assert client.hub.ranges == [None]


def test_another_file_in_its_place_is_overwritten_only_if_asked(
    client: Client, tmp_path: Path
) -> None:
    mine = tmp_path / NAME / repository()[1]
    mine.parent.mkdir()
    mine.write_bytes(b"my own training")
    text = client.error(NAME, tmp_path)
    assert f"{mine}: exists already and is not the file on the hub" in text
    assert "replace it with overwrite= or choose another directory" in text
    assert mine.read_bytes() == b"my own training"
    assert client.hub.ranges == []
    assert client.call(NAME, tmp_path, overwrite=True).path == str(mine)
    assert mine.read_bytes() == noise(100_000)
    assert client.hub.ranges == [None]
    # the right file is kept
    assert client.call(NAME, tmp_path, overwrite=True).path == str(mine)
    assert client.hub.ranges == [None]


def test_a_cut_connection_is_resumed_where_it_broke(client: Client) -> None:
    content = noise(PIECE + 2_000_000)
    client.hub.files[repository()] = HubFile(content)
    client.hub.cuts = [PIECE + 1_000_000]
    path = client.path(NAME)
    assert client.hub.ranges == [None, f"bytes={PIECE}-"]
    assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(content).digest()


@pytest.mark.slow
def test_a_connection_cut_for_good_leaves_nothing(client: Client) -> None:
    client.hub.cuts = [5_000] * 100
    text = client.error(NAME)
    assert "the connection was cut; no partial file was left" in text
    assert client.hub.endpoint in text
    assert client.hub.ranges
    assert client.weights() == []


@pytest.mark.parametrize("into_directory", [False, True])
def test_a_wrong_hash_deletes_the_file(
    client: Client, tmp_path: Path, into_directory: bool
) -> None:
    target = tmp_path / "weights" if into_directory else None
    stated, got = "ab" * 32, hashlib.sha256(noise(100_000)).hexdigest()
    client.hub.files[repository()] = HubFile(noise(100_000), sha256=stated)
    text = client.error(NAME, target)
    assert f"{repository()[1]}: the download has another sha256 than the hub states" in text
    assert f"expected: sha256 {stated}" in text
    assert f"got: sha256 {got} (100000 bytes)" in text
    assert "hint: fetch it again" in text
    assert client.weights() == []
    assert list(tmp_path.rglob(repository()[1])) == []

    client.hub.files[repository()] = HubFile(noise(100_000))
    assert client.path(NAME, target).read_bytes() == noise(100_000)


def test_a_hash_that_only_the_listing_states_is_checked(client: Client) -> None:
    client.hub.files[repository()] = HubFile(noise(100_000), etag="c0ffee")
    assert client.path(NAME).read_bytes() == noise(100_000)

    client.hub.files[repository()] = HubFile(noise(9_000), etag="decaf", sha256="ab" * 32)
    assert f"expected: sha256 {'ab' * 32}" in client.error(NAME)


def test_a_file_without_a_stated_hash_is_not_downloaded(client: Client) -> None:
    client.hub.files[repository()] = HubFile(noise(100_000), etag="c0ffee", listed=False)
    assert "the hub states no hash" in client.error(NAME)
    assert client.hub.ranges == []


def test_a_file_that_the_hub_does_not_have(client: Client) -> None:
    client.hub.files.clear()
    text = client.error(NAME)
    assert "the hub has no such file" in text
    assert f"look at {client.hub.endpoint}/{repository()[0]}" in text


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_file_names_the_page_and_the_login(client: Client, status: int) -> None:
    client.hub.refused[repository(GATED)[0]] = (status, "GatedRepo")
    text = client.error(GATED)
    assert "only to users who accepted its terms" in text
    assert f"accept them at {client.hub.endpoint}/{repository(GATED)[0]}" in text
    assert "`hf auth login`" in text


def test_an_open_repository_that_refuses_is_not_called_gated(client: Client) -> None:
    client.hub.refused[repository()[0]] = (401, "")
    text = client.error(NAME)
    assert "the repository is private or gone, or the token invalid" in text
    assert "accepted" not in text


def test_a_server_error_is_reported(client: Client) -> None:
    client.hub.refused[repository()[0]] = (503, "")
    assert "HTTP status 503" in client.error(NAME)


def test_a_file_larger_than_the_disk_is_not_downloaded(client: Client) -> None:
    client.hub.files[repository()] = HubFile(noise(100_000), size=10**18)
    assert "the disk is full" in client.error(NAME)
    assert client.hub.ranges == []
    assert client.weights() == []


def test_a_directory_that_is_a_file(client: Client, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert "cannot be read or written there" in client.error(NAME, tmp_path / "file")


def test_offline_mode(client: Client, tmp_path: Path) -> None:
    text = client.error(NAME, HF_HUB_OFFLINE="1")
    assert "offline mode is on, and there is no earlier download" in text
    assert "unset HF_HUB_OFFLINE" in text

    path = client.path(NAME)
    assert client.path(NAME, HF_HUB_OFFLINE="1") == path

    path = client.path(NAME, tmp_path)
    answer = client.call(NAME, tmp_path, HF_HUB_OFFLINE="1")
    assert answer.path == str(path)
    assert f"{path} cannot be checked" in answer.warnings[0]


def test_a_damaged_file_in_the_cache_is_not_used_offline(client: Client) -> None:
    client.path(NAME).write_bytes(noise(99_000))
    assert "has another sha256" in client.error(NAME, HF_HUB_OFFLINE="1")
    assert client.weights() == []


def test_a_hub_out_of_reach(client: Client) -> None:
    assert "could not be reached" in client.error(NAME, HF_ENDPOINT="http://127.0.0.1:9")
    path = client.path(NAME)
    assert client.path(NAME, HF_ENDPOINT="http://127.0.0.1:9") == path


OWN = "someone/networks"
CONFIG = b'{"_class_name": "AutoencoderKL"}'


@pytest.fixture
def repository_of_networks(client: Client) -> Client:
    """A hub with a repository as diffusers saves a pipeline, and other files next to it."""
    files = client.hub.files
    files.clear()
    for name in (
        "vae/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "halves/taesd_encoder.safetensors",
        "halves/taesd_decoder.safetensors",
        "alone/any name.safetensors",
        "sd-v1.5/vae.safetensors",
    ):
        files[OWN, name] = HubFile(name.encode() * 100)
    for name in ("vae/config.json", "unet/config.json", "model_index.json"):
        files[OWN, name] = HubFile.small(CONFIG)
    files[OWN, "unet/diffusion_pytorch_model.safetensors.index.json"] = HubFile.small(b"{}")
    files[OWN, "docs/README.md"] = HubFile.small(b"words")
    return client


def test_a_file_of_a_repository(repository_of_networks: Client) -> None:
    client, file = repository_of_networks, "halves/taesd_encoder.safetensors"
    path = client.path(f"{OWN}:{file}")
    assert path.read_bytes() == file.encode() * 100
    assert [one.name for one in client.weights() if one.is_symlink()] == [path.name]
    assert client.call(f"{OWN}:{file}", find=True).path == str(path)


def test_a_folder_of_a_repository_brings_its_config(repository_of_networks: Client) -> None:
    client = repository_of_networks
    path = client.path(f"{OWN}:vae")
    assert path.name == "diffusion_pytorch_model.safetensors"
    assert sorted(one.name for one in path.parent.iterdir()) == ["config.json", path.name]
    assert (path.parent / "config.json").read_bytes() == CONFIG
    assert client.call(f"{OWN}:vae", find=True).path == str(path.parent)


def test_shards_come_with_their_index(repository_of_networks: Client, tmp_path: Path) -> None:
    path = repository_of_networks.path(f"{OWN}:unet/", tmp_path)
    assert path == tmp_path / "networks/unet/diffusion_pytorch_model.safetensors.index.json"
    names = {one.name for one in path.parent.iterdir() if one.is_file()}
    shards = {f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    assert names == {path.name, "config.json", *shards}


def test_the_only_weights_of_a_folder_may_have_any_name(repository_of_networks: Client) -> None:
    assert repository_of_networks.path(f"{OWN}:alone").name == "any name.safetensors"


def test_a_folders_name_may_have_a_dot(repository_of_networks: Client) -> None:
    path = repository_of_networks.path(f"{OWN}:sd-v1.5")
    assert path.parts[-2:] == ("sd-v1.5", "vae.safetensors")


@pytest.mark.parametrize(
    ("folder", "what", "hint"),
    [
        ("", "is a pipeline", f"name one of them: {OWN}:"),
        (":halves", "holds several files of weights", f"{OWN}:halves/taesd_decoder.safetensors"),
        (":docs", "holds no safetensors weights", f"{OWN}:FILE"),
    ],
)
def test_a_folder_without_clear_weights_is_refused(
    repository_of_networks: Client, folder: str, what: str, hint: str
) -> None:
    answer = repository_of_networks.call(OWN + folder)
    assert f"{OWN}{folder}: {what}" in answer.error
    assert hint in answer.error
    assert repository_of_networks.hub.ranges == []


def test_a_repository_that_is_not_there(repository_of_networks: Client) -> None:
    client = repository_of_networks
    assert "the hub has no such file" in client.error(f"{OWN}:nowhere")
    assert "the hub has no such file" in client.error(f"{OWN}:vae/other.safetensors")
    client.hub.refused[OWN] = (403, "GatedRepo")
    assert "only to users who accepted its terms" in client.error(f"{OWN}:vae")


def test_a_small_file_has_gits_hash(repository_of_networks: Client) -> None:
    client = repository_of_networks
    client.hub.files[OWN, "vae/config.json"].content = CONFIG.replace(b"KL", b"XX")
    text = client.error(f"{OWN}:vae")
    assert "config.json: the download has another git-hash than the hub states" in text


def test_a_name_is_found_where_it_was_fetched_and_is_never_fetched(client: Client) -> None:
    text = client.call(NAME, find=True).error
    assert "has not been fetched" in text
    assert f"hint: to download it from the hub: sdconv fetch {NAME}" in text
    assert client.hub.ranges == []
    path = client.path(NAME)
    assert client.call(NAME, find=True).path == str(path)
    assert client.call("a-name-of-nothing", find=True).path == "None"


def test_a_revision_is_asked_for(client: Client) -> None:
    path = Path(client.call(NAME, revision="v1.0").path)
    assert path.read_bytes() == noise(100_000)
    refs = [one.name for one in client.home.glob("hub/models--*/refs/*")]
    assert refs == ["v1.0"]


def test_what_ships_need_not_be_fetched() -> None:
    with pytest.raises(InputError, match="ships with sdconv, and need not be fetched"):
        fetch("tiny-vae")


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean sdxl-vae-fp16-fix") as caught:
        fetch("sdxl-vae-fp16fix")
    assert all(name in str(caught.value) for name in load_manifest())
    with pytest.raises(InputError, match="mean sdxl-base or sdxl-refiner or sdxl-vae or"):
        fetch("SDXL")
    with pytest.raises(InputError, match="choose one of these names"):
        fetch("")


def test_importing_it_does_not_import_the_hub() -> None:
    look = "import sys, sdconv.hub.download; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", look], capture_output=True, text=True, check=True
    )
    assert not {"huggingface_hub", "torch", "diffusers"} & set(loaded.stdout.split())
    assert "sdconv.hub.download" in loaded.stdout.split()

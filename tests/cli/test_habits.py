"""What all commands have in common: sizes, dtypes, option names in messages, and --force."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import seeded
from helpers.commands import answer, run
from helpers.slow import marked_slow
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.main import get_command

import sdconv
from sdconv.analysis import anatomy
from sdconv.cli import app
from sdconv.cli.common import Dtype
from sdconv.cli.ending import TRACEBACK, in_option_names

KL = seeded.kl((32, 32, 32, 32), 4, True, layers_per_block=1, scaling_factor=0.25)
COMMANDS: Mapping[str, Any] = get_command(app).commands  # type: ignore[attr-defined]


def options_of(command: str) -> dict[str, Any]:
    """A command's options by name, such as ``--size``, and its arguments by metavar."""
    return {name: one for one in COMMANDS[command].params for name in (*one.opts, one.metavar)}


def with_option(option: str) -> list[str]:
    return [command for command in COMMANDS if option in options_of(command)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a network, a photo of 37 rows and 50 columns, and latents."""
    folder = tmp_path_factory.mktemp("habits")
    sdconv.save(seeded.network(KL), folder / "vae.safetensors")
    sdconv.save(seeded.network(KL), folder / "vae")
    sdconv.save(seeded.network(KL, 1), folder / "tuned.safetensors")
    matrices = {"up": torch.ones(32, 1, 1, 1), "down": torch.ones(1, 4, 3, 3)}
    lora = {f"lora_vae_decoder_conv_in.lora_{k}.weight": v for k, v in matrices.items()}
    save_file(lora, folder / "lora.safetensors")
    y, x = np.mgrid[:37, :50]
    pixels = np.stack([x * 5, y * 6, (x * y) % 256], -1).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    save_file({"z": torch.zeros(1, 4, 3, 4)}, folder / "z.safetensors")
    save_file({"z": torch.zeros(2, 4, 3, 4)}, folder / "two.safetensors")
    return folder


@pytest.fixture
def here(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a copy of the inputs."""
    folder = tmp_path / "here"
    shutil.copytree(inputs, folder)
    monkeypatch.chdir(folder)
    return folder


def check_extra(command: str) -> None:
    """Skip a test of a command whose extra is not installed."""
    if command == "export":
        pytest.importorskip("openvino", reason="needs the export extra: pip install '.[export]'")


def but_export(commands: Iterable[str]) -> list[Any]:
    """Commands as parameters, ``export``, which takes seconds, marked ``slow``."""
    every = list(commands)
    return marked_slow(every, but=[one for one in every if one != "export"])


# --- sizes

# a command line for each command with --size, and how its answer states rows and columns
SIZED: Mapping[str, tuple[str, Any]] = {
    "check": ("check vae.safetensors", lambda said: said["input_shapes"]["encode"][2:]),
    "encode": ("encode photo.png -m vae.safetensors", lambda said: [said["height"], said["width"]]),
    "reconstruct": (
        "reconstruct photo.png -m vae.safetensors",
        lambda said: [said["height"], said["width"]],
    ),
    "anatomy": ("anatomy vae.safetensors", lambda said: said["size"]),
    "plan": ("plan vae.safetensors --no-time", lambda said: [said["height"], said["width"]]),
    "export": (
        "export vae.safetensors --half decoder -o out.xml",
        lambda said: said["size"],
    ),
    "bench": ("bench vae.safetensors --explain", lambda said: said["size"]),
    "features": (
        "features photo.png -m vae.safetensors -l encoder.conv_in -o maps",
        lambda said: sdconv.open_maps(said["maps"])["encoder.conv_in"].shape[2:],
    ),
}


def test_the_table_has_every_command_with_a_size() -> None:
    assert set(SIZED) == set(with_option("--size"))


@pytest.mark.parametrize("command", but_export(SIZED))
def test_a_size_is_rows_and_columns(command: str, here: Path) -> None:
    check_extra(command)
    line, stated = SIZED[command]
    assert list(stated(answer(*line.split(), "--size", "24x32"))) == [24, 32]


@pytest.mark.parametrize("command", but_export(SIZED))
def test_a_size_is_one_number(command: str, here: Path) -> None:
    check_extra(command)
    line, stated = SIZED[command]
    is_resized = options_of(command)["--size"].help.startswith("Resize")
    rows = 24 if is_resized else 32  # of 37x50, the longer side becomes 32
    assert list(stated(answer(*line.split(), "--size", "32"))) == [rows, 32]


@pytest.mark.parametrize("size", ["8xx8", "0", "0x8", "8x8x8", "big", "-1", "", "1e3", "9" * 12])
@pytest.mark.parametrize("command", SIZED)
def test_what_is_not_a_size_is_refused(command: str, size: str, here: Path) -> None:
    result = run(*SIZED[command][0].split(), f"--size={size}")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--size: not a size" in result.stderr


# --- dtypes

SPELLINGS = {
    "float32": Dtype.float32,
    "fp32": Dtype.float32,
    "float16": Dtype.float16,
    "fp16": Dtype.float16,
    "bfloat16": Dtype.bfloat16,
    "bf16": Dtype.bfloat16,
    "float64": Dtype.float64,
    "fp64": Dtype.float64,
}
# what a command needs in addition to the option under test, so that its line can be parsed
NEEDED = {
    "inspect": "a.safetensors",
    "check": "a.safetensors",
    "convert": "a.safetensors b.safetensors --layout original",
    "merge-lora": "a.safetensors b.safetensors --out c.safetensors",
    "extract-lora": "a.safetensors b.safetensors --rank 2 --out c.safetensors",
    "average": "a.safetensors b.safetensors --out c.safetensors",
    "export": "a.safetensors --half decoder --out a.onnx",
    "diff": "a.safetensors b.safetensors",
    "encode": "a.png --model a.safetensors",
    "decode": "z.safetensors --model a.safetensors",
    "reconstruct": "a.png --model a.safetensors",
    "fetch": "taesd",
    "anatomy": "a.safetensors",
    "plan": "",
    "bench": "a.safetensors",
    "features": "a.png --model a.safetensors --out maps",
}


@pytest.mark.parametrize("command", with_option("--dtype"))
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_dtype_has_a_long_and_a_short_name(command: str, spelling: str) -> None:
    words = [*NEEDED[command].split(), "--dtype", spelling]
    with COMMANDS[command].make_context(command, words) as context:
        assert context.params["dtype"] is SPELLINGS[spelling]


@pytest.mark.parametrize("command", with_option("--dtype"))
def test_an_unknown_dtype_is_refused(command: str) -> None:
    result = run(command, *NEEDED[command].split(), "--dtype", "int8")
    assert result.exit_code == 2
    assert "'int8' is not one of float32, float16, bfloat16, float64, fp32" in result.stderr


def test_dtypes_are_in_every_command_that_computes() -> None:
    computing = ["check", "convert", "encode", "decode", "reconstruct", "plan", "features"]
    computing += ["extract-lora", "bench"]
    computing += ["export", "anatomy"]  # the latter for the memory of weights and activations
    assert with_option("--dtype") == [name for name in COMMANDS if name in computing]


# --- outputs

# a command line that writes, and what it writes
WRITING = {
    "convert": ("convert vae.safetensors OUT --layout original", "out.safetensors"),
    "convert to a folder": ("convert vae.safetensors OUT --layout diffusers", "out"),
    "merge-lora": ("merge-lora vae.safetensors lora.safetensors -o OUT", "out.safetensors"),
    "merge-lora to a folder": ("merge-lora vae lora.safetensors -o OUT", "out"),
    "extract-lora": (
        "extract-lora vae.safetensors tuned.safetensors --rank 2 -o OUT",
        "out.safetensors",
    ),
    "average": ("average vae.safetensors tuned.safetensors -o OUT", "out.safetensors"),
    "encode": ("encode photo.png -m vae.safetensors -o OUT", "out.safetensors"),
    "decode": ("decode z.safetensors -m vae.safetensors -o OUT", "out.png"),
    "reconstruct": ("reconstruct photo.png -m vae.safetensors -o OUT", "out.png"),
    "features": (
        "features photo.png -m vae.safetensors -l encoder.conv_in -o OUT",
        "out",
    ),
    "export": ("export vae.safetensors --half decoder --size 16 -o OUT", "out.xml"),
    "diff": ("diff vae.safetensors vae.safetensors --plot OUT", "out.png"),
    "anatomy": ("anatomy vae.safetensors --size 64 --plot OUT", "out.svg"),
    "explain-page": ("explain-page -o OUT", "out.html"),
}


def test_the_table_has_every_command_that_writes() -> None:
    writing = {*with_option("--out"), *with_option("OUT"), *with_option("--plot")}
    assert writing == {line.split()[0] for line, _ in WRITING.values()}
    # fetch checks and keeps what it has downloaded before; its --force is tested with a hub
    assert writing | {"fetch"} == set(with_option("--force"))


@pytest.mark.parametrize("case", but_export(WRITING))
def test_an_output_that_exists_is_overwritten_only_by_force(case: str, here: Path) -> None:
    check_extra(case)
    line, name = WRITING[case]
    words, out = [name if word == "OUT" else word for word in line.split()], here / name
    assert run(*words).exit_code == 0
    before = contents(out)
    mark(out)
    marked = contents(out)
    refused = run(*words)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert f"{name}: exists already, and is not overwritten\n  hint: pass --force" in refused.stderr
    assert contents(out) == marked != before
    assert run(*words, "--force").exit_code == 0
    after = contents(out)
    assert set(after) >= set(before)
    assert not any(content == MARK for path, content in after.items() if path in before)
    # files of other names in an existing folder are left alone
    assert all(after[path] == MARK for path in after if path not in before)


MARK = b"an older output"


def contents(out: Path) -> dict[str, bytes]:
    """The bytes of a file, or of all files in a folder, by path."""
    files = sorted(out.rglob("*")) if out.is_dir() else [out]
    return {str(path): path.read_bytes() for path in files if path.is_file()}


def mark(out: Path) -> None:
    """Overwrites a file, or the files in a folder, and puts another one next to them."""
    for path in contents(out):
        Path(path).write_bytes(MARK)
    if out.is_dir():
        (out / "notes.txt").write_bytes(MARK)


def test_an_empty_folder_is_not_an_existing_output(here: Path) -> None:
    for case in ("convert to a folder", "features"):
        shutil.rmtree(here / "out", ignore_errors=True)
        (here / "out").mkdir()
        words = WRITING[case][0].replace("OUT", "out").split()
        assert run(*words).exit_code == 0


def test_numbered_images_are_not_overwritten_either(here: Path) -> None:
    words = "decode two.safetensors -m vae.safetensors -o out.png".split()
    (here / "out.png").write_bytes(MARK)  # not among the outputs, which are numbered
    assert run(*words).exit_code == 0
    (here / "out-0.png").unlink()
    assert "out-1.png: exists already" in run(*words).stderr
    assert not (here / "out-0.png").exists()
    assert run(*words, "-f").exit_code == 0
    assert (here / "out.png").read_bytes() == MARK


@pytest.mark.parametrize(
    "line",
    [
        "convert vae.safetensors vae.safetensors --layout original",
        "merge-lora vae.safetensors lora.safetensors -o lora.safetensors",
        "merge-lora vae lora.safetensors -o vae",
        "extract-lora vae.safetensors tuned.safetensors --rank 2 -o tuned.safetensors",
        "average vae.safetensors tuned.safetensors -o tuned.safetensors",
        "encode photo.png -m vae.safetensors -o vae.safetensors",
        "decode z.safetensors -m vae.safetensors -o photo.png",
        "reconstruct photo.png -m vae.safetensors -o photo.png",
        "diff vae.safetensors copy.png --plot copy.png",
        "anatomy vae.png --plot vae.png",
    ],
)
def test_an_input_is_never_overwritten(line: str, here: Path) -> None:
    shutil.copy(here / "vae.safetensors", here / "copy.png")
    shutil.copy(here / "vae.safetensors", here / "vae.png")
    if line.startswith("decode"):  # an input under another name
        (here / "z.safetensors").rename(here / "photo.png")
        line = line.replace("decode z.safetensors", "decode photo.png")
    before = contents(here)
    result = run(*line.split(), "--force")
    assert result.exit_code == 2
    assert "the output is one of the inputs" in result.stderr
    assert contents(here) == before


# --- which weights

# the options by which a command's weights are chosen and read, apart from --component
CHOOSING = {
    "inspect": "family prefix key",
    "check": "family prefix key ema clamp",
    "convert": "family prefix key clamp",
    "diff": "key",
    "encode": "family prefix model-key ema clamp",
    "decode": "family prefix model-key ema clamp",
    "reconstruct": "family prefix model-key ema clamp",
    "anatomy": "family prefix key",
    "plan": "family prefix key",
    "bench": "family prefix key ema",
    "features": "family prefix model-key ema clamp",
    "export": "family prefix key ema clamp",
}


@pytest.mark.parametrize("command", CHOOSING)
def test_weights_are_chosen_by_the_same_options(command: str) -> None:
    own = options_of(command)
    for name in CHOOSING[command].split():
        first = next(one for one in CHOOSING if name in CHOOSING[one].split())
        twin = options_of(first)[f"--{name}"]
        assert (own[f"--{name}"].help, own[f"--{name}"].metavar) == (twin.help, twin.metavar)


@pytest.fixture
def several(here: Path) -> Path:
    """The folder, with a pickle of two sets of weights, and a file of two copies of a VAE."""
    tensors = seeded.tensors(KL)
    doubled = {name: 2 * tensor for name, tensor in tensors.items()}
    torch.save({"params": tensors, "params_ema": doubled}, here / "two.pt")
    copies = {f"first_stage_model.{name}": tensor for name, tensor in tensors.items()}
    copies |= {f"other.{name}": tensor for name, tensor in doubled.items()}
    save_file(copies, here / "copies.safetensors")
    return here


# a command line that opens weights, W
OPENING = {
    "inspect": "inspect W",
    "check": "check W --size 32",
    "convert": "convert W o.safetensors --layout diffusers",
    "diff": "diff W W",
    "encode": "encode photo.png -m W -o o.safetensors",
    "decode": "decode z.safetensors -m W -o o.png",
    "reconstruct": "reconstruct photo.png -m W -o o.png",
    "anatomy": "anatomy W --size 64",
    "plan": "plan W --size 64 --no-time",
    "bench": "bench W --size 64 --explain",
    "features": "features photo.png -m W -l encoder.conv_in -o maps",
    "export": "export W --half decoder --size 32 -o o.onnx",
}


@pytest.mark.parametrize("command", but_export(OPENING))
def test_a_key_chooses_in_a_pickle(command: str, several: Path) -> None:
    words = OPENING[command].replace("W", "two.pt").split()
    option = "--model-key" if "-m" in words else "--key"
    refused = run(*words)
    assert refused.exit_code == 2 and f"pass {option} params" in refused.stderr
    chosen = run(*words, option, "params")
    assert chosen.exit_code == 0, chosen.stderr
    assert "chose nothing" not in chosen.stderr
    assert run(*words, option, "absent", "--force").exit_code == 2


@pytest.mark.parametrize("command", but_export(one for one in OPENING if one != "diff"))
def test_a_prefix_chooses_among_copies(command: str, several: Path) -> None:
    words = OPENING[command].replace("W", "copies.safetensors").split()
    result = run(*words, "--prefix", "other")
    assert result.exit_code == 0, result.stderr


def test_a_prefix_decides_the_result(several: Path) -> None:
    found = []
    for prefix in ("first_stage_model", "other"):
        line = f"encode photo.png -m copies.safetensors --prefix {prefix} -o {prefix}.safetensors"
        assert run(*line.split()).exit_code == 0
        found.append(load_file(several / f"{prefix}.safetensors")["latents"])
    assert not torch.allclose(*found)


@pytest.mark.parametrize("command", [c for c in CHOOSING if "ema" in CHOOSING[c].split()])
def test_averages_that_are_missing_are_named(command: str, here: Path) -> None:
    line = OPENING[command].replace("W", "vae.safetensors").replace(" --explain", "")
    result = run(*line.split(), "--ema")
    assert result.exit_code == 2 and "no running averages" in result.stderr


@pytest.mark.parametrize(
    "command", but_export(c for c in CHOOSING if "clamp" in CHOOSING[c].split())
)
def test_values_beyond_a_dtype_are_clamped_on_request(command: str, here: Path) -> None:
    tensors = seeded.tensors(KL)
    tensors["decoder.conv_in.bias"] = tensors["decoder.conv_in.bias"].clone()
    tensors["decoder.conv_in.bias"][0] = 70000.0
    save_file(tensors, here / "large.safetensors")
    words = OPENING[command].replace("W", "large.safetensors").split()
    words += ["--dtype", "float16", "--family", "sd1"]
    refused = run(*words)
    assert refused.exit_code == 2 and "decoder.conv_in.bias" in refused.stderr
    assert "or pass --clamp for the largest finite value" in refused.stderr
    clamped = run(*words, "--clamp")
    assert "were clamped, first decoder.conv_in.bias" in clamped.stderr


# --- messages

NAMED = """
inspect vae.safetensors --family sd99              | error: --family: unknown family
check vae.safetensors --against someone            | error: --against: unknown reference
check vae.safetensors --device nowhere             | error: --device: no such device
convert vae.safetensors o --layout diffusers --family x | error: --family: unknown family
anatomy vae.safetensors --size 4                   | error: --size: the image is too small
anatomy vae.safetensors --component unet           | hint: pass --component vae
encode photo.png -m vae.safetensors --device no    | error: --device: no such device
decode z.safetensors -m vae.safetensors --memory x | error: --memory: not a
"""


@pytest.mark.parametrize(
    "line", NAMED.strip().splitlines(), ids=lambda line: line.split("|")[0].strip()
)
def test_messages_name_options_as_the_command_line_does(line: str, here: Path) -> None:
    command, words = line.split("|")
    result = run(*command.split())
    assert result.exit_code == 2
    assert words.strip() in result.stderr
    assert not re.search(r"\b(family|component|device|against|size|memory)=", result.stderr)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("family: unknown", "--family: unknown"),
        ("pass family= to decide", "pass --family to decide"),
        ("pass component='vae' or component='unet'", "pass --component vae or --component unet"),
        ("memory_limit: too small", "--memory: too small"),
        ("a family: of two", "a family: of two"),
        ("component.family: odd", "component.family: odd"),
        ("pass dtype=torch.float16", "pass dtype=torch.float16"),  # this command has no --dtype
    ],
)
def test_arguments_become_options(message: str, expected: str) -> None:
    options = {name: f"--{name}" for name in ("family", "component", "memory")}
    assert in_option_names(message, options) == expected


def test_an_internal_error_has_no_traceback(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Injects a fault: a function that raises what no caller can mend."""

    def broken(*_: object) -> None:
        raise LookupError("a mistake")

    monkeypatch.setattr(anatomy, "dissect", broken)
    result = run("anatomy", "vae.safetensors")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(
        "error: an internal error of sdconv\n  got: LookupError: a mist"
    )
    monkeypatch.setenv(TRACEBACK, "1")
    with pytest.raises(LookupError):
        run("anatomy", "vae.safetensors")


# --- progress


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ("encoding", ("encode", "photo.png", "-m", "tiny.safetensors")),
        ("decoding", ("decode", "z.safetensors", "-m", "tiny.safetensors")),
        ("encoding and decoding", ("reconstruct", "photo.png", "-m", "tiny.safetensors")),
        ("timing strips: encode", ("plan", "tiny.safetensors", "--size", "64x64")),
        ("timing strips: decode", ("plan", "tiny.safetensors", "--size", "64x64")),
        (
            "exporting",
            ("export", "vae.safetensors", "--half", "decoder", "--size", "64", "-o", "o.onnx"),
        ),
    ],
)
def test_a_bar_shows_percent_and_the_time_that_is_left(
    words: str, command: tuple[str, ...], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "export" in command:
        pytest.importorskip("onnxscript", reason="needs: pip install 'sdconv[export]'")
    sdconv.save(seeded.network(seeded.SMALL_TINY), here / "tiny.safetensors")
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm"), ("COLUMNS", "120")):
        monkeypatch.setenv(name, value)  # a terminal to rich
    bar = re.compile(rf"{words} \S+ +100% 0:00:00")
    forced = () if command[0] == "plan" else ("--force",)
    quiet, shown = run(*command, "--quiet"), run(*command, *forced)
    for result in (quiet, shown):
        assert result.exit_code == 0, result.stderr
    escapes = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
    assert bar.search(escapes.sub("", shown.stderr))
    assert not bar.search(escapes.sub("", quiet.stderr)), "the control"

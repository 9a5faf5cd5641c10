"""The stages of the GPU's checks, in small on a CPU, each with a fault that it must notice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from scripts.gpu import networks
from scripts.gpu.options import Options
from scripts.gpu.precision import BFLOAT16, FLOAT32, float32_by_tf32
from scripts.gpu.record import DeviceLostError, Record
from scripts.gpu.stages import parity, profile, speed, streaming, tests, variants
from sdconv.analysis.parity import ModuleDifference

SMALL = Options("cpu", small=True, compiled=False)


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(tmp_path, "parity", 300)


def rows(record: Record) -> dict[str, dict[str, Any]]:
    """The rows as they are in the file."""
    content = json.loads((record.folder / f"{record.stage}.json").read_text())
    return {row["key"]: row for row in content["rows"]}


def complaints(record: Record) -> list[str]:
    found: list[str] = record.content["complaints"]
    return found


# --- the record


def test_a_row_that_fails_is_a_row_and_the_next_one_goes_on(record: Record) -> None:
    def fail() -> dict[str, Any]:
        raise ValueError("no such thing\nin two lines")

    assert record.measure("first", fail, side="a") is None
    assert record.measure("second", lambda: {"figure": float("nan")}) is not None
    found = rows(record)
    assert found["first"]["error"] == "ValueError: no such thing"
    assert "in two lines" in found["first"]["traceback"]
    assert found["first"]["side"] == "a"
    assert complaints(record) == []
    record.measure("third", fail, must_work=True)
    assert complaints(record) == ["third: ValueError: no such thing"]
    assert found["second"] == {"key": "second", "figure": "nan"}


def test_a_row_is_given_up_or_left_out_for_want_of_time(record: Record) -> None:
    def wait() -> dict[str, Any]:
        while True:
            pass

    record.measure("slow", wait, most=0.2)
    assert rows(record)["slow"]["error"].startswith("TimeoutError: given up after 0")
    record.measure("too slow", wait, most=0.1, must_work=True)
    assert complaints(record) == ["too slow: TimeoutError: given up after 0 s"]
    late = Record(record.folder, "speed", 0.2)
    late.measure("late", wait, must_work=True)
    assert "late" in rows(late) and complaints(late) == [], "its time was up: no fault of the row"
    record.measure("long", dict, least=1e6)
    assert "long" not in rows(record)
    assert record.content["left_out"] == ["long"]


def test_a_record_goes_on_where_it_was(record: Record) -> None:
    record.measure("first", lambda: {"figure": 1})
    again = Record(record.folder, record.stage, 300)
    assert again.measure("first", lambda: {"figure": 2}) is None
    again.measure("second", lambda: {"figure": 2})
    assert [row["figure"] for row in rows(again).values()] == [1, 2]


def test_a_device_that_does_not_answer_is_noticed(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def fail() -> dict[str, Any]:
        raise ValueError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        record.measure("first", fail)
    assert "first" in rows(record), "so that the next process goes on after it"


# --- parity


def compared(record: Record, dtype: Any = FLOAT32) -> dict[str, Any]:
    """The row of the network that ships."""
    tensors = networks.tensors_of(networks.SHIPPED, SMALL)
    with torch.no_grad():
        return parity.measured(record, SMALL, networks.SHIPPED, dtype, tensors)


def test_the_shipped_network_passes_and_its_controls_fail(record: Record) -> None:
    parity.network_rows(record, SMALL, networks.SHIPPED, (BFLOAT16, FLOAT32))
    assert complaints(record) == []
    found = rows(record)
    assert list(found) == [
        f"{prefix}{networks.SHIPPED}, {dtype}"
        for prefix, dtype in (
            ("", "bfloat16"),
            ("control: ", "bfloat16"),
            ("", "float32"),
            ("control: ", "float32"),
        )
    ]
    for key, row in found.items():
        wanted = "failed, as it must" if key.startswith("control") else "passed"
        assert (row["reference"], row["fast"]) == (wanted, wanted), key
    exact = found[f"{networks.SHIPPED}, float32"]
    assert exact["equal"] == exact["compared"] > 100 and exact["first"] is None
    modules = record.folder / "modules" / "shipped-tiny-VAE-trained-float32.json"
    assert len(json.loads(modules.read_text())) == exact["compared"]


def test_an_unnoticed_control_is_a_complaint(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = networks.tensors_of(networks.SHIPPED, SMALL)
    monkeypatch.setattr(parity, "plant", lambda network: "decoder.mid_block.resnets.0.conv1")
    parity.control(record, SMALL, networks.SHIPPED, FLOAT32, tensors)
    assert len(complaints(record)) == 1
    assert "was not noticed" in complaints(record)[0]


def test_a_mistake_fails_the_row_and_is_named(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = parity.trio_of

    def faulty(*given: Any) -> parity.Trio:
        trio = right(*given)
        parity.plant(trio.ours)
        return trio

    monkeypatch.setattr(parity, "trio_of", faulty)
    row = compared(record)
    assert (row["reference"], row["fast"]) == ("failed", "failed")
    assert row["first"] == "decoder.mid_block.resnets.0.conv1"
    assert row["reason"] == "Conv2d: differs for the same input"
    assert row["reference_why"].startswith(row["first"])
    assert "errs by" in row["fast_why"]


class Doubles(nn.Module):
    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.part, self.shift = Double(), shift

    def forward(self, x: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        return (self.part(x + self.shift),)


class Double(nn.Module):
    noise: Iterator[float] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x + (next(self.noise) if self.noise else 0)


@pytest.mark.parametrize(
    ("shift", "noise", "reason"),
    [
        (1.0, None, "equal for the same input"),
        (0.0, [0.0, 1.0, 2.0, 3.0], "other bits each time"),
    ],
)
def test_why_a_module_differs(shift: float, noise: Any, reason: str) -> None:
    ours, theirs = Doubles(shift), Doubles()
    theirs.part.noise = noise and iter(noise)
    trio = parity.Trio(ours, theirs, theirs, {"forward": (torch.ones(1),)})
    row = ModuleDifference("part", 1, (1,), 1.0, 1.0, 1, False, 0.0)
    assert reason in parity.reason(trio, row)


def test_overflow_on_both_sides_is_no_difference() -> None:
    nan = float("nan")
    both = ModuleDifference("decode", 1, (1,), nan, nan, 1, False, 1.0)
    one = ModuleDifference("decode", 1, (1,), float("inf"), float("inf"), 1, False, 1.0)
    trio: Any = SimpleNamespace(inputs={"decode": ()})
    assert parity.judged((both,), trio)["reference"] == "overflows on both sides"
    assert parity.judged((both, one), trio)["reference"] == "failed"


# --- tests


def test_outcomes_are_noted_as_they_come(record: Record, tmp_path: Path) -> None:
    lines = [
        "tests/test_gpu.py::test_a[cuda-float32] PASSED                    [ 33%]\n",
        "tests/test_gpu.py::test_b[with a space] FAILED                    [ 66%]\n",
        "tests/test_gpu.py::test_c SKIPPED (needs a CUDA device; ...)      [100%]\n",
        "[gw0] [ 50%] PASSED tests/test_gpu.py::test_d[of several processes] \n",
        "[gw12] [100%] ERROR tests/test_gpu.py::test_e\n",
        "== 1 failed, 1 passed, 1 skipped in 3.00s ==\n",
    ]
    with (tmp_path / "log").open("w") as log:
        counts = tests.follow(record, lines, log)
    assert counts == {"passed": 2, "failed": 1, "skipped": 1, "error": 1}
    assert record.content["facts"]["counts"] == dict(counts)
    failed = ["tests/test_gpu.py::test_b[with a space]", "tests/test_gpu.py::test_e"]
    assert list(rows(record)) == failed
    assert complaints(record) == [f"{failed[0]}: failed", f"{failed[1]}: error"]
    assert (tmp_path / "log").read_text() == "".join(lines)


@pytest.mark.parametrize(
    ("counts", "status", "complaint"),
    [
        ({"passed": 3}, 0, None),
        ({"passed": 3}, 3, "status 3"),
        ({"skipped": 3}, 0, "no test has passed"),
        ({}, 5, "no test has passed"),
    ],
)
def test_a_run_of_no_test_is_not_a_success(
    record: Record, counts: Any, status: int, complaint: str | None
) -> None:
    tests.judge(record, tests.Counter(counts), status, on_gpu=True)
    assert bool(complaints(record)) is bool(complaint)
    assert complaint is None or complaint in " ".join(complaints(record))


def test_the_files_with_tests_for_a_gpu_are_found() -> None:
    found = {file.name for file in tests.marked(tests.ROOT / "tests")}
    assert {"test_gpu.py", "test_streaming_cuda.py"} <= found
    assert "test_imports.py" not in found


# --- speed

WORK = speed.Work(networks.SDXL_VAE, "decode", 32, 1, FLOAT32)


def test_sides_are_compared_and_a_side_that_fails_is_a_row(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = speed.caller

    def caller(network: Any, work: Any, side: speed.Side, options: Options) -> Any:
        if side == speed.CHANNELS_LAST:
            raise torch.OutOfMemoryError("no room for 2 GiB")
        return right(network, work, side, options)

    monkeypatch.setattr(speed, "caller", caller)
    bench = speed.Bench(record, SMALL)
    for side in (speed.EAGER, speed.CHANNELS_LAST, speed.FAST):
        bench.add(WORK, side)
    assert complaints(record) == []
    bench.add(WORK, speed.RECORDED)  # which there is on a GPU only
    assert len(complaints(record)) == 1 and speed.RECORDED.name in complaints(record)[0]
    eager, failed, fast, _ = rows(record).values()
    assert "no room for 2 GiB" in failed["error"] and "milliseconds" not in failed
    assert eager["milliseconds"] > 0 and eager["difference"] is None
    assert 0 < fast["difference"] < 1e-4


def test_a_fast_wrong_answer_is_a_complaint(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, right = speed.Bench(record, SMALL), networks.built

    def built(*given: Any) -> Any:
        network = right(*given)
        parity.plant(network)
        return network

    bench.add(WORK, speed.EAGER)
    monkeypatch.setattr(networks, "built", built)
    bench.add(WORK, speed.FAST)
    assert len(complaints(record)) == 1 and "differs from diffusers" in complaints(record)[0]


def test_the_most_valuable_rows_come_first_and_none_comes_twice() -> None:
    plan = list(speed.plan(Options()))
    assert sum(sides is speed.VARIANTS for _, sides in plan) == 1
    rows = [(work, side) for work, sides in plan for side in sides]
    assert len(set(rows)) == len(rows)
    first = rows[0][0]
    assert (first.network, first.method, first.size) == (networks.SDXL_VAE, "decode", 1024)
    assert {side for _, side in rows[:4]} == {
        speed.EAGER,
        speed.FAST,
        speed.RECORDED,
        speed.COMPILED,
    }
    works = {work for work, _ in rows}
    for network in (networks.SDXL_VAE, networks.FLUX1_VAE):
        assert sum(work.network == network for work in works) == 2 * 3 * 2 * 2
    for work in works:
        assert {side for one, side in rows if one == work} >= set(speed.SIDES)


# --- variants


class Choices:
    """A table of choices, with the functions of the fast backend's."""

    VARIANTS: ClassVar = {"tiling": ("small", "large"), "upsample": ("four", "one", "direct")}

    def __init__(self) -> None:
        self.table = {"tiling": "small", "upsample": "four"}
        self.written: dict[str, str] = {}

    def current(self) -> dict[str, str]:
        return dict(self.table)

    @contextmanager
    def using(self, chosen: dict[str, str]) -> Iterator[None]:
        before, self.table = self.table, self.table | chosen
        yield
        self.table = before

    def write(self, path: Path, chosen: dict[str, str]) -> None:
        self.written = chosen


@pytest.mark.parametrize(
    ("times", "right", "written"),
    [
        ({"large": -5, "one": -1, "direct": -2}, True, {"tiling": "large", "upsample": "direct"}),
        ({"large": 5, "one": -1, "direct": 2}, True, {"tiling": "small", "upsample": "one"}),
        ({"large": 5, "one": 1, "direct": 2}, True, {}),
        ({"large": -0.01, "one": 0, "direct": 0}, True, {}),
        ({"large": -5, "one": -1, "direct": -2}, False, {}),
    ],
)
def test_the_fastest_variants_become_the_table(
    record: Record, times: dict[str, float], right: bool, written: dict[str, str]
) -> None:
    choices = Choices()

    def measure() -> dict[str, Any]:
        taken = 20 + sum(times.get(variant, 0) for variant in choices.table.values())
        return {"milliseconds": taken, "right": right}

    variants.add(record, choices, measure, least=0)
    assert choices.written == written
    assert choices.current() == {"tiling": "small", "upsample": "four"}
    assert len(rows(record)) == 1 + 3 + bool(written)
    assert ("faster_choices" in record.content["facts"]) is bool(written)


def test_variants_are_those_of_the_fast_backend() -> None:
    choices = pytest.importorskip("sdconv.fast.cuda.choices", reason="this backend has no choice")
    found = set(variants.others(choices))
    assert found == {
        (operation, variant)
        for operation, every in choices.VARIANTS.items()
        for variant in every
        if variant != choices.current()[operation]
    }


# --- profile


def event(name: str, device: str, us: float, shapes: Any = (), kernels: Any = ()) -> Any:
    return SimpleNamespace(
        name=name,
        device_type=f"DeviceType.{device}",
        input_shapes=shapes,
        time_range=SimpleNamespace(elapsed_us=lambda: us),
        is_user_annotation=name == "annotated",
        kernels=[SimpleNamespace(name=kernel, duration=time) for kernel, time in kernels],
    )


def test_every_kernel_is_counted_once() -> None:
    shapes = [[1, 4, 8, 8], [8, 4, 3, 3]]
    events = [
        event("aten::conv2d", "CPU", 50, shapes),
        event("aten::cudnn_convolution", "CPU", 40, shapes, [("zero", 1), ("conv", 29)]),
        event("zero", "CUDA", 1),
        event("conv", "CUDA", 29),
        event("cuLaunchKernelEx", "CPU", 3, (), [("part_stats", 5)]),
        event("part_stats", "CUDA", 5),
        event("part_stats", "CUDA", 7),
        event("annotated", "CUDA", 42),
    ]
    spent, counts = profile.by_kernel(events)
    convolution = ("aten::cudnn_convolution", ((1, 4, 8, 8), (8, 4, 3, 3)))
    assert spent == {convolution: 30, ("part_stats", ()): 12}
    assert counts == {convolution: 1, ("part_stats", ()): 2}


def test_bounds() -> None:
    image, kernel = (2, 4, 8, 6), (16, 4, 3, 3)
    pixels = 2 * 8 * 6
    convolution = profile.work_of("aten::cudnn_convolution", (image, kernel, (16,)))
    assert convolution[0] == pixels * 4 * 16 * 9
    assert convolution[1] == pixels * 4 + 4 * 16 * 9 + 16 + pixels * 16
    # four times as many output pixels, from as many multiplications as a 4x4 kernel has taps
    transposed = profile.work_of("aten::cudnn_convolution_transpose", (image, (4, 16, 4, 4)))
    assert transposed[0] == pixels * 4 * 16 * 16
    assert transposed[1] == pixels * 4 + 4 * 16 * 16 + 4 * pixels * 16
    heads = (1, 1, 48, 512)
    attention = profile.work_of("aten::_scaled_dot_product_flash_attention", (heads,) * 3)
    assert attention == (48 * 48 * 1024, 4 * 48 * 512)
    assert profile.work_of("aten::addmm", ((5,), (3, 4), (4, 5)))[0] == 60
    assert profile.work_of("part_stats", ()) == (0, 0)
    ceilings = {"rate": 1.0, "bandwidth": 1000.0}
    by_products = profile.bound("aten::mm", ((1000, 1000), (1000, 1000)), 2, ceilings)
    assert by_products == pytest.approx(2000)  # 2e9 operations at 1e12 a second
    by_bytes = profile.bound("aten::silu", ((1000, 1000),), 2, ceilings)
    assert by_bytes == pytest.approx(4)  # 4e6 bytes at 1e12 a second
    assert profile.bound("aten::mm", ((1, 1), (1, 1)), 2, {"rate": None, "bandwidth": 1}) is None


def test_a_decode_is_profiled(tmp_path: Path) -> None:
    environment = Record(tmp_path, "environment")
    environment.row("matrix product, float32", rate=1.0)
    environment.row("copy", rate=100.0)
    record = Record(tmp_path, "profile")
    profile.run(record, SMALL)
    found, facts = list(rows(record).values()), record.content["facts"]
    assert facts["rate"] == 1.0 and facts["bandwidth"] == 100.0
    assert 0 < facts["share"] < 2
    times = [row["milliseconds"] for row in found]
    assert times == sorted(times, reverse=True) and len(times) > 3
    assert sum(row["of_total"] for row in found) <= 1 + 1e-6
    (attention,) = (row for row in found if "scaled_dot_product" in row["operation"])
    assert attention["bound_milliseconds"] > 0


def test_without_ceilings_there_is_no_bound(record: Record) -> None:
    ceilings = profile.ceilings_of(record, "float32")
    assert ceilings == {"rate": None, "bandwidth": None}
    assert profile.bound("aten::mm", ((1, 1), (1, 1)), 2, ceilings) is None


# --- streaming


def test_streaming_is_compared_with_tiles(record: Record) -> None:
    streaming.run(record, SMALL)
    assert complaints(record) == []
    found = rows(record)
    allowed = record.content["facts"]["allowed_error"]
    assert found[streaming.STREAMED]["distance"] <= allowed
    assert found[streaming.STREAMED]["from_unstreamed"] < 2 * allowed
    assert found[streaming.TILED]["distance"] > 1e-2


def test_a_streamed_decode_that_fails_is_a_complaint(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "memory_held_to", None)
    streaming.run(record, SMALL)
    assert complaints(record) == ["the streamed decode failed"]
    found = rows(record)
    assert "error" in found[streaming.STREAMED] and found[streaming.TILED]["distance"] > 0


@pytest.mark.parametrize(
    ("errors", "complaint"),
    [
        ({"sdconv, streamed": 2e-3, "sdconv, unstreamed": 1e-3, "diffusers, tiles": 0.5}, None),
        ({"sdconv, streamed": 3e-3, "sdconv, unstreamed": 1e-3}, "the streamed decode errs"),
        ({"sdconv, streamed": 1e-3, "diffusers, tiles": 1e-6}, "shows nothing"),
        (
            {"sdconv, streamed": float("nan"), "sdconv, unstreamed": 1e-3},
            "the streamed decode errs",
        ),
    ],
)
def test_streaming_is_judged(record: Record, errors: Any, complaint: str | None) -> None:
    streaming.judge(record, errors, least=1e-3)
    assert bool(complaints(record)) is bool(complaint)
    assert complaint is None or complaint in complaints(record)[0]


# --- TF32


def test_tf32_is_switched_and_switched_back() -> None:
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    for allowed in (True, False):
        with pytest.raises(KeyError), float32_by_tf32(allowed):
            assert [flag.allow_tf32 for flag in flags] == [allowed] * 2
            raise KeyError
        assert [flag.allow_tf32 for flag in flags] == before
    assert BFLOAT16.tf32 is False

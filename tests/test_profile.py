"""--profile: where the time of a step goes; and the MFU of pre-training."""

import json
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

import common
from helpers import PRETRAIN, call, metrics
from model import Model, ModelConfig


def event(name, start, seconds, device=DeviceType.CPU, **more):
    """A stand-in for a profiler's event; times are in microseconds."""
    time = SimpleNamespace(start=start, end=start + seconds)
    marked = name in common.RANGES or "#" in name
    values = dict(id=0, is_user_annotation=marked) | more
    return SimpleNamespace(name=name, time_range=time, device_type=device, **values)


def kernel(start, seconds, launch):
    return event("gemm", start, seconds, DeviceType.CUDA, id=launch)


# A step of 100 us with two ranges. Operators have ids of their own, which calls may have, too.
STEP = [
    event("ProfilerStep#6", 0, 100),
    event("forward", 0, 10),
    event("aten::mm", 4, 2, id=8),
    event("backward", 20, 10),
    event("Optimizer.step#Adam.step", 40, 5),
]


# --------------------------------------------------------------------------- shares of a step


def test_shares_on_a_cpu_are_those_of_the_ranges():
    shares, seconds = common.time_shares(STEP)
    assert shares == pytest.approx({"forward": 0.1, "backward": 0.1, "the rest": 0.8})
    assert seconds == pytest.approx(1e-4)


def test_a_kernel_counts_where_it_was_launched():
    """Not where it runs, which is later; the backward pass launches from a thread of its own."""
    events = [
        *STEP,
        event("cudaLaunchKernel", 5, 1, id=7),
        event("cudaLaunchKernel", 25, 1, id=8, thread=2),
        event("cuLaunchKernelEx", 15, 1, id=9),  # in no range
        kernel(10, 30, launch=7),
        kernel(45, 40, launch=8),
        kernel(41, 2, launch=9),
        event("forward", 10, 30, DeviceType.CUDA),  # a range's own line on the GPU
    ]
    shares, _ = common.time_shares(events)
    assert shares == pytest.approx({"forward": 0.3, "backward": 0.4, "the rest": 0.3})


def test_kernels_of_a_graph_count_where_it_was_launched():
    """A captured token is many kernels of one call, which no operator surrounds."""
    events = [
        event("ProfilerStep#6", 0, 100),
        event("sampling", 0, 50),
        event("forward", 60, 10),
        event("cudaGraphLaunch", 5, 1, id=7),
        *(kernel(10 + 5 * i, 4, launch=7) for i in range(10)),
        event("cudaLaunchKernel", 61, 1, id=8),
        kernel(65, 20, launch=8),
    ]
    shares, _ = common.time_shares(events)
    assert shares == pytest.approx({"sampling": 0.4, "forward": 0.2, "the rest": 0.4})


def test_kernels_that_overlap_are_no_more_than_the_whole():
    events = [
        *STEP,
        event("cudaLaunchKernel", 5, 1, id=7),
        event("cudaLaunchKernel", 25, 1, id=8),
        kernel(10, 90, launch=7),
        kernel(10, 90, launch=8),
    ]
    shares, _ = common.time_shares(events)
    assert shares == pytest.approx({"forward": 0.5, "backward": 0.5, "the rest": 0})


@pytest.mark.parametrize("stage", ["pretrain", "mix"])  # mix does what sft and rl do
def test_profile_accounts_for_a_step(world, tmp_path, capsys, stage, monkeypatch):
    monkeypatch.setattr(common, "WARM_UP", 2)
    found = []
    real = common.time_shares
    monkeypatch.setattr(common, "time_shares", lambda events: found.append(events) or real(events))
    out = tmp_path / f"{stage}.pt"
    names = ["data", "forward", "loss head", "backward", "reduce", "optimizer", "the rest"]
    if stage == "pretrain":
        call(stage, *PRETRAIN, out=out, profile=1, data=world.data, tokens=4 * 1024, micro=8)
    else:
        names[1:1] = ["sampling", "reward"]
        sizes = dict(questions_per_step=4, group=4, batch=8, max_new=12, eval_questions=0)
        call(stage, init=world.taught, out=out, profile=1, steps=4, compile="false", **sizes)
    said = capsys.readouterr().out
    shares, seconds = real(*found)
    assert list(shares) == names and all(f"  {name}" in said for name in names)
    assert all(share > 0 for share in shares.values()) and sum(shares.values()) == pytest.approx(1)
    (trace,) = tmp_path.rglob("*.trace.json")
    assert seconds > 0 and json.loads(trace.read_text())["traceEvents"]
    steps = [e for e in found[0] if e.name.startswith("ProfilerStep")]
    assert len(steps) == 1
    spans = sorted((e.time_range.start, e.time_range.end) for e in found[0] if e.name in names)
    nested = [a for a, b in zip(spans, spans[1:], strict=False) if a[1] > b[0]]
    assert nested == [], "a range inside another would be counted twice"


def test_a_run_too_short_to_profile_says_so(world, tmp_path, capsys):
    call("pretrain", *PRETRAIN, out=tmp_path / "p", profile=2, data=world.data, tokens=2 * 1024)
    assert "--profile" in capsys.readouterr().err and not list(tmp_path.rglob("*.trace.json"))


# ---------------------------------------------------------------------------------------- MFU


def test_mfu_is_left_out_where_no_peak_is_known(world, tmp_path):
    last = {}
    for peak in (0, 0.25):
        out = tmp_path / str(peak)
        call("pretrain", *PRETRAIN, data=world.data, out=out, tokens=2 * 1024, peak_tflops=peak)
        last[peak] = out / "step2.pt"
    assert all(mfu is None for _, mfu in metrics(last[0], "mfu"))
    model = Model(ModelConfig(**common.load(last[0.25])["config"]))
    for _, mfu, speed in metrics(last[0.25], "mfu", "tokens_per_s"):
        assert mfu == pytest.approx(model.flops_per_token(64) * speed / 0.25e12)

"""Where the time of a step goes: `--profile N`, a trace and a table of shares.

The ranges are torch.profiler.record_function("forward") and so on in model.py, ranks.py and the scripts. They do not overlap,
and the gradient of the loss head is made in its forward pass: "backward" is that of the blocks and the embedding.
"""

import bisect
import json
from pathlib import Path

from torch.profiler import profile, schedule

RANGES = ("data", "sampling", "reward", "forward", "loss head", "backward", "reduce", "optimizer")
WARM_UP = 5  # steps before: compilation, CUDA graphs, the first allocations


def profiled(steps, count: int, path, active: bool = True):
    """The items of `steps`. The trace of `count` of them, after WARM_UP others, goes to `path` (chrome's format, for Perfetto
    and chrome://tracing) with the shares of the time in it, which are printed too."""
    if not count or not active:
        yield from steps
        return

    def ready(profiler):
        profiler.export_chrome_trace(str(path))
        trace = json.loads(Path(path).read_text())
        trace["shares"], seconds = shares(trace["traceEvents"])
        Path(path).write_text(json.dumps(trace))
        lines = (f"  {name:10}{share:6.1%}" for name, share in trace["shares"].items())
        print(f"\n{path}: {seconds * 1e3:.1f} ms a step", *lines, sep="\n", flush=True)

    with profile(schedule=schedule(wait=WARM_UP - 1, warmup=1, active=count, repeat=1), on_trace_ready=ready) as profiler:
        for step in steps:
            yield step
            profiler.step()


def shares(events: list[dict]) -> tuple[dict[str, float], float]:
    """Of the events of a chrome trace: the share of the profiled steps' time that each range took, and "the rest", the sum is 1;
    and the seconds of a step. With a GPU it is the GPU's time, by the range from which a kernel was launched, and the rest is
    idle or elsewhere; kernels that run side by side count twice."""
    spans = [(e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if e.get("cat") == "user_annotation"]
    steps = [end - begin for begin, end, name in spans if name.startswith("ProfilerStep")]
    spans = sorted(span for span in spans if span[2] in RANGES)
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    spent = dict.fromkeys((name for name in RANGES if any(span[2] == name for span in spans)), 0.0)
    if kernels:
        launched = {e["args"]["correlation"]: e["ts"] for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver")}
        for kernel in kernels:
            at = launched.get(kernel["args"]["correlation"], -1)
            place = bisect.bisect(spans, at, key=lambda span: span[0]) - 1
            if place >= 0 and at <= spans[place][1]:
                spent[spans[place][2]] += kernel["dur"]
    else:
        for begin, end, name in spans:
            spent[name] += end - begin
    total = max(sum(steps), sum(spent.values()))
    spent["the rest"] = total - sum(spent.values())
    return {name: time / total for name, time in spent.items()}, sum(steps) / len(steps) / 1e6

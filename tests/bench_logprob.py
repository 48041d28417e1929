"""The log-prob kernels beside the best public ones, and the CPU path beside plain PyTorch.

    python tests/bench_logprob.py [--json]
    python tests/bench_logprob.py --shape 32768,2048,100352 --no-cpu

The competitors are in tests/requirements-slow.txt. One task for all: bf16 hidden states and an fp32
master head in, mean negative log-prob, gradients in both out, the cast of the head included.
TFLOP/s count 2NDV for the forward pass (without gradient) and 6NDV for forward and backward,
whatever is recomputed; memory is the peak beyond inputs and gradients; the error is the largest
difference of a gradient from fp32's, over the largest gradient. Without CUDA the kernels run in
Triton's interpreter at a tiny shape, which shows that this script works and nothing about speed.
The CPU part is one SFT step of the default model with 100,352 words.
"""

import os
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when model.py is imported

import bench  # noqa: E402
import model as network  # noqa: E402
from model import PRESETS, Model, ModelConfig, log_probs, weighted_nll  # noqa: E402

V = 100352
SHAPES = [(32768, 2048, V), (4096, 2048, V), (4096, 3072, V), (32768, 3072, V)]
TINY = [(32, 64, 500)]
HALF = torch.bfloat16 if CUDA else torch.float32  # bf16 is wrong in the interpreter
OURS = "ours"


# ------------------------------------------------------------------------------------ the sides


class Peer(NamedTuple):
    function: object  # (hidden, head, target) -> mean negative log-prob
    missing: str = ""  # why it cannot run
    filtered: bool = False  # whether it drops small gradients


def ours(hidden, head, target):
    if torch.is_grad_enabled():
        weight = torch.full(target.shape, 1 / len(target), device=target.device)
        return weighted_nll(hidden, head, target, weight, len(head))[0]
    return -log_probs(hidden, head, target, len(head))[0].mean()


def eager(hidden, head, target):
    return F.cross_entropy((hidden @ head.to(hidden.dtype).T).float(), target)


def competitors() -> dict[str, Peer]:
    here = "" if CUDA else "needs CUDA"
    found = {"PyTorch eager": Peer(eager), "torch.compile": Peer(torch.compile(eager), here)}
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()

        def pytorch(hidden, head, target):
            return F.linear_cross_entropy(hidden, head.to(hidden.dtype), target, options=options)

        found["F.linear_cross_entropy"] = Peer(pytorch)
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        criterion = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)

        def liger(hidden, head, target):
            return criterion(head.to(hidden.dtype), hidden, target)

        found["Liger"] = Peer(liger, here)
    except ImportError as problem:
        found["Liger"] = Peer(None, f"not installed: {problem}")
    try:
        from cut_cross_entropy import linear_cross_entropy

        def cut(hidden, head, target, filter_eps):
            return linear_cross_entropy(
                hidden, head.to(hidden.dtype), target, filter_eps=filter_eps
            )

        found["cut-cross-entropy, exact"] = Peer(partial(cut, filter_eps=None), here)
        filtered = partial(cut, filter_eps="high")
        found["cut-cross-entropy, filtered"] = Peer(filtered, here, filtered=True)
    except ImportError as problem:
        found["cut-cross-entropy"] = Peer(None, f"not installed: {problem}")
    return found


# ----------------------------------------------------------------------------------- measuring


def milliseconds(work, count=10 if CUDA else 1) -> float:
    """Median of count runs, after two to warm up."""
    times = []
    for _ in range(count + 2 * CUDA):
        if CUDA:
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            began = time.perf_counter()
            work()
            times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[2 * CUDA :])


def peak(work) -> float:
    """GB allocated on the GPU at the worst moment of work, beyond what is there; NaN without."""
    if not CUDA:
        work()
        return float("nan")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


class Task:
    """Inputs of one shape, and the gradients in fp32."""

    def __init__(self, N: int, D: int, V: int):
        generator = torch.Generator().manual_seed(0)
        device = "cuda" if CUDA else "cpu"
        hidden = torch.randn(N, D, generator=generator)
        head = torch.randn(V, D, generator=generator) * 2 * D**-0.5  # logits of std 2
        self.shape = (N, D, V)
        self.hidden = hidden.to(device, HALF).requires_grad_()
        self.head = head.to(device).requires_grad_()
        self.target = torch.randint(V, (N,), generator=generator).to(device)
        gradients = self.hidden.nbytes + 4 * self.head.numel()
        self.gradients = gradients / 1e9 if CUDA else 0.0
        self.exact = self.reference()

    def reference(self):
        """The gradients by our path in PyTorch, in fp32, chunk by chunk."""
        wide = self.hidden.detach().float().requires_grad_()
        real = self.head.detach().to(HALF).float().requires_grad_()
        fast = network.use_triton
        network.use_triton = lambda x: False
        ours(wide, real, self.target).backward()
        network.use_triton = fast
        return wide.grad, real.grad

    def both(self, function):
        self.hidden.grad = None
        self.head.grad = None
        function(self.hidden, self.head, self.target).backward()

    @torch.no_grad()
    def forward(self, function):
        return function(self.hidden, self.head, self.target)

    def measure(self, function):
        """Milliseconds forward, and forward and backward; GB; error of the gradients."""
        times = [milliseconds(partial(work, function)) for work in (self.forward, self.both)]
        self.hidden.grad = None
        self.head.grad = None
        memory = peak(lambda: self.both(function)) - self.gradients
        found = (self.hidden.grad, self.head.grad)
        pairs = zip(found, self.exact, strict=True)
        error = max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)
        return *times, memory, error


def lines_of(shape) -> tuple[list, dict]:
    """The lines of one shape, and {name: ms forward and backward} of the sides that ran."""
    N, D, V = shape
    task = Task(*shape)
    lines = []
    times = {}
    for name, peer in {OURS: Peer(ours), **competitors()}.items():
        title = f"{N} x {D} x {V}, {name}"
        if peer.missing:
            lines.append([title, peer.missing])
            continue
        try:
            first, both, memory, error = task.measure(peer.function)
        except Exception as problem:  # a competitor that fails is a line; ours must not
            if name == OURS:
                raise
            lines.append([title, f"failed: {bench.why(problem)}"])
            continue
        speeds = [2 * N * D * V / first / 1e9, 6 * N * D * V / both / 1e9]
        figures = [(first, ".2f"), (speeds[0], ".3g"), (both, ".2f"), (speeds[1], ".3g")]
        figures += [(memory, ".2f"), (error, ".1e")]
        lines.append([title, *(bench.number(*pair) for pair in figures)])
        times[name] = (first, both)
    return lines, times


# ------------------------------------------------------------------------ one SFT step on the CPU


def plain_nll(hidden, head, target, weight, vocab, temperature=1.0, z_loss=0.0):
    logits = F.linear(hidden, head[:vocab]).div(temperature)
    logp = logits.log_softmax(1).gather(1, target[:, None]).squeeze(1)
    return -(weight * logp).sum(), logp.detach(), torch.zeros_like(logp.detach())


CHUNKED = network.weighted_nll
SIDES = {"plain PyTorch": plain_nll, "chunked": CHUNKED}


def sft_step(net, rows):
    """Forward and backward of `rows` answers of 128 tokens with the loss that model.py now has."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(net.config.vocab, (rows, 129), generator=generator)
    weight = torch.full((rows, 128), 1 / (128 * rows))
    net.zero_grad(set_to_none=True)
    net(ids[:, :-1], ids[:, 1:], weight=weight)[0].backward()


def memory_of(side: str) -> int:
    """Bytes that a side's step needs beyond weights and gradients; in a process of its own."""
    network.weighted_nll = SIDES[side]
    small = PRESETS["toy"] | {"layers": 1}
    sft_step(Model(ModelConfig(**small, vocab=500, padded_vocab=512)), 1)  # load what loads late
    net = Model(ModelConfig(**PRESETS["toy"])).init_weights(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak until here
        before = resident("VmRSS")
    except OSError:
        before = largest_so_far()
    sft_step(net, 8)
    try:
        most = resident("VmHWM")
    except OSError:
        most = largest_so_far()
    return most - before - sum(p.nbytes for p in net.parameters())


def resident(name: str) -> int:
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status[name].split()[0]) * 1024


def largest_so_far() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cpu(turns: int) -> tuple[list, dict]:
    """Lines of the table, and ratios: memory of plain / chunked, time of chunked / plain."""
    used = {}
    for side in SIDES:
        command = [sys.executable, __file__, "--memory", side]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        used[side] = int(done.stdout)
    net = Model(ModelConfig(**PRESETS["toy"])).init_weights(0)

    def step(side):
        network.weighted_nll = SIDES[side]
        sft_step(net, 8)

    plain, chunked, ratio = bench.turns(*(partial(step, side) for side in SIDES), turns)
    network.weighted_nll = CHUNKED
    lines = []
    for side, seconds in zip(SIDES, (plain, chunked), strict=True):
        numbers = [None, None, f"{1e3 * seconds:.0f}", None, f"{used[side] / 1e9:.2f}", None]
        lines.append([f"SFT step on the CPU, 1024 tokens, {side}", *numbers])
    first, second = used.values()
    return lines, {"cpu_memory_ratio": first / second, "cpu_time_ratio": ratio}


# ----------------------------------------------------------------------------------- the table


def count_launches() -> dict:
    """How often the kernels were launched from here on."""
    calls = {"_launch_rows": 0, "_launch_log_probs": 0}

    def counted(name, launch, *given):
        calls[name] += 1
        return launch(*given)

    for name in calls:
        setattr(network, name, partial(counted, name, getattr(network, name)))
    return calls


def main():
    flags = bench.parser(__doc__, turns=3)
    flags.add_argument("--shape", action="append", help="N,D,V: rows, width, words; may come again")
    flags.add_argument("--no-cpu", action="store_true", help="leave out the SFT step on the CPU")
    flags.add_argument("--memory", choices=SIDES, help="for a process of its own")
    args = flags.parse_args()
    if args.memory:
        return print(memory_of(args.memory))
    if network.triton is None:
        raise SystemExit("triton is not installed: pip install triton")
    shapes = [tuple(map(int, shape.split(","))) for shape in args.shape or ()]
    shapes = shapes or (SHAPES if CUDA else TINY)
    calls = count_launches()
    if not CUDA:
        network.use_triton = lambda x: x.dtype != torch.float64
    lines = []
    times = []
    for shape in shapes:
        more, found = lines_of(shape)
        lines += more
        times.append(found)
    if not all(calls.values()):
        raise SystemExit(f"the Triton path did not run: {calls}")
    figures = figures_of(times[0]) if CUDA else {}
    if not args.no_cpu:
        network.use_triton = lambda x: False
        more, ratios = cpu(args.turns)
        lines += more
        figures |= ratios
    bench.show(
        f"{bench.machine('cuda' if CUDA else 'cpu')}, {HALF}{'' if CUDA else ', interpreter'}",
        ["N x D x V", "forward ms", "TFLOP/s", "and backward ms", "TFLOP/s", "GB", "error"],
        lines,
    )
    bench.finish(args, figures)


def figures_of(times: dict) -> dict:
    """Of the first shape, beside the best competitor that drops no gradients."""
    fair = [name for name, peer in competitors().items() if name in times and not peer.filtered]
    best = min(times[name][1] for name in fair)
    first, both = times[OURS]
    return {"fwd_ms": first, "fwd_bwd_ms": both, "vs_best_peer": best / both}


if __name__ == "__main__":
    main()

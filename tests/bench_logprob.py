"""The log-prob kernels beside the best public ones, and the CPU path beside plain PyTorch.

    python tests/bench_logprob.py [--json]            (pip install -r tests/requirements-slow.txt for the competitors)

One task for all: bf16 hidden states and an fp32 master head in, mean negative log-prob, gradients in both out, the cast
of the head included. TFLOP/s count 2NDV for the forward pass (without gradient) and 6NDV for forward and backward,
whatever is recomputed; memory is the peak beyond inputs and gradients; the error is the largest difference of a gradient
from fp32's, over the largest gradient. Without CUDA the kernels run in Triton's interpreter at a tiny shape, which shows
that this script works and nothing about speed. The CPU part is one SFT step of the default model with 100,352 words.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"

import model as network  # noqa: E402
from model import PRESETS, Model, ModelConfig, log_probs, weighted_nll  # noqa: E402

V = 100352
SHAPES = [(4096, 2048, V), (32768, 2048, V), (4096, 3072, V), (32768, 3072, V)] if CUDA else [(32, 64, 500)]
HALF = torch.bfloat16 if CUDA else torch.float32  # bf16 is wrong in the interpreter
OURS = "ours"


def ours(hidden, head, target):
    if torch.is_grad_enabled():
        weight = torch.full(target.shape, 1 / len(target), device=target.device)
        return weighted_nll(hidden, head, target, weight, len(head))[0]
    return -log_probs(hidden, head, target, len(head))[0].mean()


def eager(hidden, head, target):
    return F.cross_entropy((hidden @ head.to(hidden.dtype).T).float(), target)


def competitors() -> dict:
    """name -> (function, why it cannot run or None, whether it drops small gradients)."""
    found = {"PyTorch eager": (eager, None, False)}
    found["torch.compile"] = (torch.compile(eager), None if CUDA else "needs CUDA", False)
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()

        def pytorch(hidden, head, target):
            return F.linear_cross_entropy(hidden, head.to(hidden.dtype), target, options=options)

        found["F.linear_cross_entropy"] = (pytorch, None, False)
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        criterion = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)

        def liger(hidden, head, target):
            return criterion(head.to(hidden.dtype), hidden, target)

        found["Liger"] = (liger, None if CUDA else "needs CUDA", False)
    except ImportError as problem:
        found["Liger"] = (None, f"not installed: {problem}", False)
    try:
        from cut_cross_entropy import linear_cross_entropy

        def cut(hidden, head, target, filter_eps):
            return linear_cross_entropy(hidden, head.to(hidden.dtype), target, filter_eps=filter_eps)

        for name, eps in (("cut-cross-entropy, exact", None), ("cut-cross-entropy, filtered", "high")):
            found[name] = (partial(cut, filter_eps=eps), None if CUDA else "needs CUDA", eps is not None)
    except ImportError as problem:
        found["cut-cross-entropy"] = (None, f"not installed: {problem}", False)
    return found


def milliseconds(work, count=10 if CUDA else 1) -> float:
    """Median of count runs, after two to warm up."""
    times = []
    for _ in range(count + 2 * CUDA):
        if CUDA:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
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
    """GB allocated on the GPU at the worst moment of work, beyond what is there before; nan without one."""
    if not CUDA:
        work()
        return float("nan")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def table(N, D, V) -> dict:
    """Print one table; -> {name: (forward ms, forward and backward ms)} of those that ran."""
    generator = torch.Generator().manual_seed(0)
    device = "cuda" if CUDA else "cpu"
    hidden = torch.randn(N, D, generator=generator).to(device, HALF).requires_grad_()
    head = (torch.randn(V, D, generator=generator) * 2 * D**-0.5).to(device).requires_grad_()  # logits of std 2
    target = torch.randint(V, (N,), generator=generator).to(device)
    gradients = (hidden.numel() * hidden.element_size() + head.numel() * 4) / 1e9

    def both(function):
        hidden.grad = head.grad = None
        function(hidden, head, target).backward()

    @torch.no_grad()
    def forward(function):
        return function(hidden, head, target)

    wide, real = hidden.detach().float().requires_grad_(), head.detach().to(HALF).float().requires_grad_()
    fast, network.use_triton = network.use_triton, lambda x: False  # the reference in fp32, chunk by chunk
    ours(wide, real, target).backward()
    network.use_triton = fast
    exact = wide.grad, real.grad
    del wide, real

    print(f"\nN = {N}, D = {D}, V = {V}, {HALF}, {torch.cuda.get_device_name() if CUDA else 'interpreter'}, torch {torch.__version__}")
    print(f"{'':28}{'forward':>22}{'forward + backward':>32}{'error':>10}")
    print(f"{'':28}{'ms':>10}{'TFLOP/s':>12}{'ms':>10}{'TFLOP/s':>12}{'GB':>10}")
    results = {}
    for name, (function, missing, _) in {OURS: (ours, None, False), **competitors()}.items():
        if missing:
            print(f"{name:28}{missing}")
            continue
        try:
            times = milliseconds(lambda f=function: forward(f)), milliseconds(lambda f=function: both(f))
            hidden.grad = head.grad = None
            memory = peak(lambda f=function: both(f)) - gradients
            error = max(float((x.grad - y).abs().max() / y.abs().max()) for x, y in zip((hidden, head), exact, strict=True))
        except Exception as problem:  # a competitor that fails is a line of the table; ours must not
            if name == OURS:
                raise
            print(f"{name:28}failed: {str(problem).splitlines()[0][:80]}")
            continue
        speed = [count * N * D * V / ms / 1e9 for count, ms in zip((2, 6), times, strict=True)]
        print(f"{name:28}{times[0]:10.2f}{speed[0]:12.3g}{times[1]:10.2f}{speed[1]:12.3g}{memory:10.2f}{error:10.1e}")
        results[name] = times
    return results


# ---- one SFT step on the CPU


def plain_nll(hidden, head, target, weight, vocab, temperature=1.0, z_loss=0.0):
    logp = F.linear(hidden, head[:vocab]).div(temperature).log_softmax(1).gather(1, target[:, None]).squeeze(1)
    return -(weight * logp).sum(), logp.detach()


def sft_step(net, rows):
    """Forward and backward of `rows` answers of 128 tokens with the loss that model.py now has."""
    ids = torch.randint(net.config.vocab, (rows, 129), generator=torch.Generator().manual_seed(0))
    weight = torch.full((rows, 128), 1 / (128 * rows))
    net.zero_grad(set_to_none=True)
    net(ids, weight=weight)[0].backward()


def memory(side) -> int:
    """Bytes that the step of one side needs at its worst moment beyond weights and gradients; in a process of its own."""
    use(side)
    sft_step(Model(ModelConfig(**PRESETS["toy"] | {"layers": 1}, vocab=500, padded_vocab=512)), 1)  # load what loads late
    net = cpu_model()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak until here
        status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        before = int(status["VmRSS"].split()[0]) * 1024
    except OSError:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sft_step(net, 8)
    try:
        status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        most = int(status["VmHWM"].split()[0]) * 1024
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return most - before - sum(4 * p.numel() for p in net.parameters())


def cpu_model():
    return Model(ModelConfig(**PRESETS["toy"])).init_weights(0)


CHUNKED = network.weighted_nll


def use(side):
    network.weighted_nll = {"plain": plain_nll, "chunked": CHUNKED}[side]


def cpu() -> dict:
    sides = "plain", "chunked"
    command = [sys.executable, __file__, "--memory"]
    used = {side: int(subprocess.run([*command, side], capture_output=True, text=True, check=True).stdout) for side in sides}
    net, pairs = cpu_model(), []
    for turn in range(4):  # in turns, because the speed of a shared machine drifts; the first warms up
        pair = []
        for side in sides:
            use(side)
            began = time.perf_counter()
            sft_step(net, 8)
            pair.append(time.perf_counter() - began)
        pairs += [pair] if turn else []
    ratio = statistics.median(chunked / plain for plain, chunked in pairs)
    print(f"\nOne SFT step on the CPU, 1024 tokens, width 96, V = {V}, fp32, {torch.get_num_threads()} threads")
    for side, seconds in zip(sides, zip(*pairs, strict=True), strict=True):
        print(f"{side:28}{statistics.median(seconds):10.2f} s{used[side] / 1e6:10.0f} MB beyond weights and gradients")
    return {"cpu_memory_ratio": used["plain"] / used["chunked"], "cpu_time_ratio": ratio}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object in the last line")
    parser.add_argument("--memory", choices=["plain", "chunked"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        return print(memory(args.memory))
    if network.triton is None:
        raise SystemExit("triton is not installed: pip install triton")
    calls = {"_launch_rows": 0, "_launch_log_probs": 0}

    def counted(name, launch, *given):
        calls[name] += 1
        return launch(*given)

    for name in calls:
        setattr(network, name, partial(counted, name, getattr(network, name)))
    if not CUDA:
        network.use_triton = lambda x: x.dtype != torch.float64
    found = {shape: table(*shape) for shape in SHAPES}
    if not all(calls.values()):
        raise SystemExit(f"the Triton path did not run: {calls}")
    network.use_triton = lambda x: False
    figures = cpu()
    if CUDA:
        times = found[32768, 2048, V]
        fair = [name for name, (_, _, filtered) in competitors().items() if name in times and not filtered]
        best = min(fair, key=lambda name: times[name][1])
        figures |= {"fwd_ms": times[OURS][0], "fwd_bwd_ms": times[OURS][1], "vs_best_peer": times[best][1] / times[OURS][1]}
        print(f"\nbest competitor that drops no gradients: {best}")
    print("\n" + ", ".join(f"{name} {value:.3g}" for name, value in figures.items()))
    if args.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()

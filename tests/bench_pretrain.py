"""A pre-training step beside the same model in transformers: tokens/s, MFU and peak memory, in one run.

    python tests/bench_pretrain.py                               the default world's model and batch, on the CPU
    python tests/bench_pretrain.py --ranks 2                     the same as two ranks of half the batch and half the cores each
    python tests/bench_pretrain.py --preset 1b --length 4096 --batch 8 --device cuda

Ours is the step of pretrain.py after its text has been read: forward with z-loss, backward, clipping, fused Adam, compiled
blocks, once more with --checkpoint_activations. transformers' Olmo2ForCausalLM has the same weights and its best settings:
compiled as a whole, SDPA, fused AdamW; on CUDA under autocast as well as with bf16 weights (which is less: no fp32 masters),
and vs_transformers is against the faster of the two. With --ranks both sum their gradients in one message (gloo or NCCL).

Each side is a process of its own, with the same allocator settings, and they take turns, because the speed of a shared machine
drifts: the ratio is the median over the turns. MFU counts FLOPs by Model.flops_per_token (causal attention in full, the
embedding not), against the data sheet's dense bf16 peak of a known GPU, else against a large matrix product (fp32 on a CPU)
that takes turns with the others. Peak memory, of one rank: weights, moments and what a step adds to them; on a CPU from the
peak of the resident pages in a step (Linux).
"""

import argparse
import ctypes
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from bench_cpu import transformers_twin  # noqa: E402

from data import ranks, tokens  # noqa: E402
from model import PRESETS, Model, ModelConfig, adam, update  # noqa: E402
from pretrain import SIZES, peak_flops  # noqa: E402

OURS, SAVING, PEER, HALF, PRODUCT = "ours", "ours, activations checkpointed", "transformers", "transformers, bf16 weights", "matrix product"
SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices whose product is the peak


def our_step(args, world, checkpointed):
    model = built(args, world)
    model.checkpoint_activations = checkpointed
    ranks.compile_blocks(model, dynamic=False)
    optimizer, ids, count = adam(model), rows(args, world, model.config.vocab), args.batch * args.length

    def step():
        weight = torch.full(ids[:, 1:].shape, 1 / count, device=world.device)
        loss = model(ids, weight=weight, z_loss=1e-5 / count)[0]
        loss.backward()
        grads, _ = ranks.gradients(model, world, 1.0)
        world.sum(loss.detach())
        update(model, [(optimizer, 1e-5, grads)], 0.1)

    return step, lambda: [*model.parameters(), *moments(optimizer)]


def peer_step(args, world, dtype):
    """dtype: of the weights. On CUDA fp32 weights compute under autocast to bf16."""
    twin = transformers_twin(built(args, world)).to(world.device, dtype).train()
    compiled, optimizer = torch.compile(twin, dynamic=False), torch.optim.AdamW(twin.parameters(), lr=1e-5, fused=True)
    ids, mixed = rows(args, world, twin.config.vocab_size), world.device.type == "cuda" and dtype == torch.float32
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step():
        with torch.autocast(world.device.type, torch.bfloat16, enabled=mixed):
            loss = compiled(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False).loss / world.size
        loss.backward()
        if world.size > 1:
            for p, g in zip(twin.parameters(), ranks.gradients(twin, world, 1.0)[0], strict=True):
                p.grad = g
        else:
            torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, lambda: [*twin.parameters(), *moments(optimizer)]


def bare(args, compute=torch.float32):
    vocab = tokens.VOCABULARY["toy" if args.preset.startswith("toy") else "cl100k_base"]
    shape = {**PRESETS[args.preset], "context": max(args.length, PRESETS[args.preset]["context"])}
    with torch.device("meta"):
        return Model(ModelConfig(**shape, vocab=vocab, padded_vocab=-(-vocab // 128) * 128), compute)


def built(args, world):
    return ranks.place(bare(args, world.compute), world).init_weights(0)


def rows(args, world, vocab):
    ids = torch.randint(0, vocab, (args.batch, args.length + 1), generator=torch.Generator().manual_seed(0))
    return ids[world.share(args.batch, "--batch")].to(world.device)


def moments(optimizer):
    return [x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x)]


def product(world):
    side = SIDE[world.device.type]
    a = torch.randn(side, side, device=world.device, dtype=world.compute)
    return (lambda: a @ a), lambda: []


def resident(name: str) -> int:
    """VmRSS or VmHWM (the peak) of this process in bytes."""
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])


def worker(args):
    """One side: makes its step, then for each number n on stdin runs n steps after an untimed one, and prints their seconds and the
    peak memory."""
    world = ranks.start(args.device, "auto")
    cuda, dtype = world.device.type == "cuda", torch.float32
    sides = {OURS: (our_step, False), SAVING: (our_step, True), PEER: (peer_step, dtype), HALF: (peer_step, torch.bfloat16)}
    make, *more = sides.get(args.side, (None,))
    step, kept = make(args, world, *more) if make else product(world)
    for _ in range(2):
        step()
    print("ready", flush=True)
    for line in sys.stdin:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident("VmRSS")
        step()
        world.max(0)
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(int(line)):
            step()
        if cuda:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - began) / int(line)
        memory = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM") - before + sum(x.nbytes for x in kept())
        print(seconds, memory, flush=True)
        if cuda:
            torch.cuda.empty_cache()  # the other sides' turn


def start(args, side):
    """The processes of one side, one a rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = max(1, len(os.sched_getaffinity(0)) // args.ranks)
    common = dict(os.environ, OMP_NUM_THREADS=str(threads), MALLOC_TRIM_THRESHOLD_=str(1 << 28), MALLOC_MMAP_THRESHOLD_=str(1 << 25))
    if args.ranks > 1:
        common |= {"WORLD_SIZE": str(args.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    for rank in range(args.ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if args.ranks > 1 else {}
        processes.append(subprocess.Popen([sys.executable, *sys.argv, "--side", side], env=common | own, text=True,
                                          stdin=subprocess.PIPE, stdout=subprocess.PIPE))  # fmt: skip
    for process in processes:
        if process.stdout.readline() != "ready\n":
            raise SystemExit(f"{side} did not start")
    return processes


def turn(processes, steps) -> tuple[float, float]:
    """Seconds of a step, of the slowest rank, and bytes, of the largest."""
    for process in processes:
        print(steps, file=process.stdin, flush=True)
    told = [tuple(map(float, process.stdout.readline().split())) for process in processes]
    return max(x[0] for x in told), max(x[1] for x in told)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="toy")
    parser.add_argument("--length", type=int, help="tokens a row (pretrain.py's default for the preset)")
    parser.add_argument("--batch", type=int, help="rows a step, over all ranks, in one forward pass each (default: 8)", default=8)
    parser.add_argument("--ranks", type=int, default=1, help="processes a side; on a CPU they share the cores")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--turns", type=int, default=7, help="turns of each side")
    parser.add_argument("--steps", type=int, default=5, help="steps a turn")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.length = args.length or SIZES["toy" if args.preset.startswith("toy") else "paper"]["length"]
    if args.side:
        return worker(args)
    cuda = args.device == "cuda" or args.device == "auto" and torch.cuda.is_available()
    sides = [PRODUCT, OURS, SAVING, PEER, *([HALF] if cuda else [])]
    running, results = {side: start(args, side) for side in sides}, {side: [] for side in sides}
    try:
        for _ in range(args.turns):
            for side in sides:
                results[side].append(turn(running[side], args.steps))
    finally:
        for processes in running.values():
            for process in processes:
                process.kill()
    flops = bare(args).flops_per_token(args.length)
    device = torch.device("cuda" if cuda else "cpu")
    known = peak_flops(SimpleNamespace(peak_tflops=0.0), ranks.World(0, args.ranks, device, torch.bfloat16))
    products = [2 * SIDE[device.type] ** 3 * args.ranks / seconds for seconds, _ in results.pop(PRODUCT)]
    count, peak = args.batch * args.length, known or statistics.median(products)
    speeds = {side: statistics.median(count / seconds for seconds, _ in turns) for side, turns in results.items()}
    print(f"{args.preset}, {args.batch} x {args.length} tokens a step, {args.ranks} rank(s), torch {torch.__version__}; peak "
          f"{peak / 1e12:.4g} TFLOP/s ({'data sheet' if known else 'measured'}), a product has {statistics.median(products) / 1e12:.4g}")
    print(f"{'':36}{'tokens/s':>10}{'ms a step':>11}{'MFU':>8}{'peak memory':>14}{'ours is':>9}")
    figures = {}
    for side, turns in results.items():
        ratio = statistics.median(theirs / ours for (theirs, _), (ours, _) in zip(turns, results[OURS], strict=True))
        memory = statistics.median(memory for _, memory in turns) / 2**20
        print(f"{side:36}{speeds[side]:10,.0f}{1e3 * count / speeds[side]:11,.1f}{flops * speeds[side] / peak:8.1%}{memory:10,.0f} MiB"
              f"{ratio:8.2f}x")  # fmt: skip
        figures[side] = dict(tokens_per_s=round(speeds[side]), mfu=flops * speeds[side] / peak, mib=round(memory), ours_is=round(ratio, 3))
    best = min(figure["ours_is"] for side, figure in figures.items() if side in (PEER, HALF))
    if args.json:
        print(json.dumps({"vs_transformers": best, "sides": figures}))


if __name__ == "__main__":
    main()

"""A pre-training step beside the same model in transformers: tokens/s, MFU and peak memory.

    python tests/bench_pretrain.py                  the default world's model and batch, on the CPU
    python tests/bench_pretrain.py --ranks 2        as two ranks of half the batch and cores each
    python tests/bench_pretrain.py --preset 1b --length 4096 --batch 8

Ours is the step of pretrain.py after its text has been read: forward with z-loss, backward,
clipping, fused Adam, compiled blocks; once more with --checkpoint_activations. transformers'
Olmo2ForCausalLM has the same weights and its best settings: compiled as a whole, SDPA, fused AdamW;
on CUDA under autocast as well as with bf16 weights (which is less: no fp32 masters), and
vs_transformers is against the faster of the two. With --ranks both sum their gradients in one
message (gloo or NCCL).

Each side is a process of its own, with the same allocator settings. On a CPU the sides take turns,
because the speed of a shared machine drifts: the ratio is the median over turns. On CUDA a side is
built, measured and freed before the next is built, so that each has the whole memory.

MFU counts FLOPs by Model.flops_per_token (causal attention in full, the embedding not), against the
data sheet's dense bf16 peak of a known GPU, else against a large matrix product, which is one more
side. Peak memory, of one rank: weights, moments and what a step adds to them; on a CPU from the
peak of the resident pages in a step (Linux).
"""

import ctypes
import os
import socket
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

import bench
import common
import pretrain
from model import PRESETS, Model, adam, paper_size, update
from twin import transformers_twin

OURS = "ours"
SAVING = "ours, activations checkpointed"
PEER = "transformers"
HALF = "transformers, bf16 weights"
PRODUCT = "matrix product"
SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices whose product is the peak

# ------------------------------------------------------------------- the step of one side


def our_step(args, world, checkpointed):
    model = built(args, world)
    model.checkpoint_activations = checkpointed
    common.compile_blocks(model, dynamic=False)
    optimizer = adam(model)
    ids = rows(args, world, model.config.vocab)
    count = args.batch * args.length

    def step():
        weight = torch.full(ids[:, 1:].shape, 1 / count, device=world.device)
        loss = model(ids[:, :-1], ids[:, 1:], weight=weight, z_loss=1e-5 / count)[0]
        loss.backward()
        gradients, _ = common.gradients(model, world, 1.0)
        world.sum(loss.detach())
        update(model, [(optimizer, 1e-5, gradients)], 0.1)

    return step, lambda: [*model.parameters(), *moments(optimizer)]


def peer_step(args, world, dtype):
    """dtype: of the weights. On CUDA fp32 weights compute under autocast to bf16."""
    twin = transformers_twin(built(args, world)).to(world.device, dtype).train()
    compiled = torch.compile(twin, dynamic=False)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-5, fused=True)
    ids = rows(args, world, twin.config.vocab_size)
    inputs = ids[:, :-1].contiguous()
    targets = ids[:, 1:].contiguous()
    how = dict(labels=targets, shift_labels=targets, use_cache=False)
    mixed = world.device.type == "cuda" and dtype == torch.float32

    def step():
        with torch.autocast(world.device.type, torch.bfloat16, enabled=mixed):
            loss = compiled(input_ids=inputs, **how).loss / world.size
        loss.backward()
        if world.size > 1:
            gradients, _ = common.gradients(twin, world, 1.0)
            for p, gradient in zip(twin.parameters(), gradients, strict=True):
                p.grad = gradient
        else:
            torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, lambda: [*twin.parameters(), *moments(optimizer)]


def product_step(args, world):
    side = SIDE[world.device.type]
    a = torch.randn(side, side, device=world.device, dtype=world.compute)
    return (lambda: a @ a), lambda: []


STEPS = {
    PRODUCT: (product_step,),
    OURS: (our_step, False),
    SAVING: (our_step, True),
    PEER: (peer_step, torch.float32),
    HALF: (peer_step, torch.bfloat16),
}


def bare(args, compute=torch.float32):
    with torch.device("meta"):
        return Model(bench.config_of(args.preset, args.length), compute)


def built(args, world):
    return common.materialize(bare(args, world.compute), world).init_weights(0)


def rows(args, world, vocab):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (args.batch, args.length + 1), generator=generator)
    return ids[world.share(args.batch, "--batch")].to(world.device)


def moments(optimizer):
    return [x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x)]


# ------------------------------------------------------------------- the processes of a side


def resident(name: str) -> int:
    """VmRSS or VmHWM (the peak) of this process in bytes."""
    with open("/proc/self/status") as file:
        return 1024 * int(next(line for line in file if line.startswith(name)).split()[1])


def worker(args):
    """One side of one rank. For each number n on stdin it runs n steps after one that is not timed.

    -> on stdout a line of seconds per step and peak memory in bytes.
    """
    world = common.start(args.device, "auto")
    cuda = world.device.type == "cuda"
    make, *how = STEPS[args.side]
    step, kept = make(args, world, *how)
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
        began = bench.clock(world.device)
        for _ in range(int(line)):
            step()
        seconds = (bench.clock(world.device) - began) / int(line)
        memory = resident("VmHWM") - before + sum(x.nbytes for x in kept())
        if cuda:
            memory = torch.cuda.max_memory_allocated()
        print(seconds, memory, flush=True)


def start(args, side: str) -> list[subprocess.Popen]:
    """The processes of one side, one per rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = max(1, len(os.sched_getaffinity(0)) // args.ranks)
    settings = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
    settings |= {"MALLOC_TRIM_THRESHOLD_": 1 << 28, "MALLOC_MMAP_THRESHOLD_": 1 << 25}
    if args.ranks > 1:
        settings |= {"WORLD_SIZE": args.ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        settings |= {"TORCHELASTIC_RUN_ID": "bench"}  # not started by hand
    command = [sys.executable, *sys.argv, "--side", side]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    processes = []
    for rank in range(args.ranks):
        own = {"RANK": rank, "LOCAL_RANK": rank} if args.ranks > 1 else {}
        env = os.environ | {name: str(value) for name, value in (settings | own).items()}
        processes.append(subprocess.Popen(command, env=env, **pipes))
    return processes


def turn(processes, steps) -> tuple[float, float]:
    """Seconds of a step, of the slowest rank, and bytes, of the largest."""
    for process in processes:
        print(steps, file=process.stdin, flush=True)
    told = [tuple(map(float, process.stdout.readline().split())) for process in processes]
    return max(x[0] for x in told), max(x[1] for x in told)


def measure(args, sides: list[str], results: dict):
    """Turns of sides that are there at the same time. One that fails is left out of the results."""
    running = {}
    try:
        for side in sides:
            running[side] = start(args, side)
            lines = [process.stdout.readline() for process in running[side]]
            if set(lines) == {"ready\n"}:
                results[side] = []
        for _ in range(args.turns):
            for side in sides:
                if side in results:
                    results[side].append(turn(running[side], args.steps))
    finally:
        for processes in running.values():
            for process in processes:
                process.kill()
                process.wait()


# ----------------------------------------------------------------------------------- the table


def main():
    flags = bench.parser(__doc__, turns=7)
    flags.add_argument("--preset", choices=PRESETS, default="toy")
    flags.add_argument("--length", type=int, help="tokens per row (default: pretrain.py's)")
    flags.add_argument("--batch", type=int, default=8, help="rows per step, over all ranks, in one")
    flags.add_argument("--ranks", type=int, default=1, help="processes per side; they share a CPU")
    flags.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    flags.add_argument("--steps", type=int, default=5, help="steps per turn")
    flags.add_argument("--side", help="for its own processes")
    args = flags.parse_args()
    paper = paper_size(args.preset)
    args.length = args.length or (pretrain.PAPER["length"] if paper else pretrain.Config.length)
    if args.side:
        return worker(args)
    cuda = args.device == "cuda" or args.device == "auto" and torch.cuda.is_available()
    absent = bench.missing("transformers")
    sides = [PRODUCT, OURS, SAVING]
    if not absent:
        sides += [PEER, HALF] if cuda else [PEER]
    results = {}
    for together in [[side] for side in sides] if cuda else [sides]:
        measure(args, together, results)
    if OURS not in results:
        raise SystemExit("our side did not start")
    report(args, sides, results, absent, "cuda" if cuda else "cpu")


def peak_of(args, products: list[float], device: str) -> tuple[float, str]:
    """FLOP/s of all ranks, and where the number is from."""
    world = common.World(0, args.ranks, torch.device(device), torch.bfloat16)
    known = pretrain.peak_flops(SimpleNamespace(peak_tflops=0.0), world)
    return (known, "data sheet") if known else (statistics.median(products), "measured")


def report(args, sides, results: dict, absent: str, device: str):
    flops = bare(args).flops_per_token(args.length)
    count = args.batch * args.length
    operations = 2 * SIDE[device] ** 3 * args.ranks
    products = [operations / seconds for seconds, _ in results.pop(PRODUCT)]
    peak, source = peak_of(args, products, device)
    figures = {}
    lines = []
    for side in sides[1:]:
        if side not in results:
            lines.append([side, "failed, see above"])
            continue
        pairs = zip(results[side], results[OURS], strict=True)
        ratio = statistics.median(theirs / ours for (theirs, _), (ours, _) in pairs)
        speed = statistics.median(count / seconds for seconds, _ in results[side])
        memory = statistics.median(memory for _, memory in results[side]) / 2**20
        figures[side] = dict(
            tokens_per_s=round(speed),
            mfu=flops * speed / peak,
            mib=round(memory),
            ours_is=round(ratio, 3),
        )
        formats = [(speed, ",.0f"), (1e3 * count / speed, ",.1f"), (flops * speed / peak, ".1%")]
        formats += [(memory, ",.0f"), (ratio, ".2f")]
        lines.append([side, *(bench.number(*pair) for pair in formats)])
    lines += [[PEER, absent]] if absent else []
    bench.show(
        f"{args.preset}, {args.batch} x {args.length} tokens per step, {args.ranks} ranks, "
        f"{bench.machine(device)}; peak {peak / 1e12:.4g} TFLOP/s ({source}), "
        f"a product has {statistics.median(products) / 1e12:.4g}",
        ["", "tokens/s", "ms a step", "MFU", "peak MiB", "ours is x times"],
        lines,
    )
    peers = [figures[side]["ours_is"] for side in (PEER, HALF) if side in figures]
    bench.finish(args, {"vs_transformers": min(peers, default=None), "sides": figures})


if __name__ == "__main__":
    main()

"""The parts of tests/gpu.sh, each run as a process of its own: python tests/gpu_parts.py PART OUT

On a GPU a part measures and checks at the sizes of the paper; on a CPU it runs the same lines at a
toy size, the Triton kernels in Triton's interpreter, and measures nothing. A part is a function
that prints what it found and returns its figures; an AssertionError says what is wrong.

Needs torch, triton, numpy, tiktoken and tqdm alone. METHOD, in tests/gpu.sh, says how to read it.
"""

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if CUDA else "cpu")
if not CUDA and sys.argv[1:2] in (["kernels"], ["loss"], ["token"]):
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when the kernels are defined

import common  # noqa: E402
import model as network  # noqa: E402
import rl  # noqa: E402
from data import problems  # noqa: E402
from model import (  # noqa: E402
    PRESETS,
    Cache,
    Layout,
    Model,
    ModelConfig,
    Place,
    Sampler,
    Step,
    adam,
    attend_to_cache,
    choose,
    log_probs,
    round_up,
    update,
    weighted_nll,
)

# what a machine of the acceptance run does not have, and nothing but its own users may import
ABSENT = "math_verify datasets zstandard matplotlib pandas scipy safetensors tokenizers".split()
HALF = torch.bfloat16 if CUDA else torch.float16  # bf16 is wrong in Triton's interpreter


# --------------------------------------------------------------------------------------- tools


def on_gpu(there, here):
    """A size: `there` on a GPU, `here` on a CPU."""
    return there if CUDA else here


def wait():
    if CUDA:
        torch.cuda.synchronize()


def seconds_of(work, count: int = 5) -> float:
    """Median seconds of `count` calls, after one that warms up (on a CPU one call, cold)."""
    times = []
    for _ in range(on_gpu(count + 1, 1)):
        wait()
        began = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:] or times)


def peak_gb(work) -> float:
    """GB allocated at the worst moment of a call, all that is there before included; 0 on a CPU."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    work()
    wait()
    return torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0.0


def random_model(compute, layers=2, width=64, heads=4, ffn=128, vocab=500, context=2048):
    """A model of normal weights (std 0.02) on the device; weights in fp32, or fp64 for fp64."""
    master = torch.float64 if compute == torch.float64 else torch.float32
    padded = round_up(vocab, 128)
    config = ModelConfig(layers, width, heads, ffn, vocab, padded, context)
    with torch.device("meta"):
        model = Model(config, compute).to(master)
    model.to_empty(device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02, generator=generator) if p.dim() > 1 else p.fill_(1)
    return model


def sharper(model, factor: float = 20):
    """With a head so large that answers are not of equally probable ids."""
    with torch.no_grad():
        model.head.weight.mul_(factor)
    return model


def some_ids(count: int, lengths, vocab: int, seed: int = 0) -> list[list[int]]:
    """`count` lists of random ids; their lengths are drawn from the range `lengths`."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(*lengths, (count,), generator=generator).tolist()
    return [torch.randint(vocab, (size,), generator=generator).tolist() for size in sizes]


def distance(found, exact) -> float:
    """|found - exact| / |exact|, of tensors or of lists of them, in fp64."""
    found, exact = (x if isinstance(x, list) else [x] for x in (found, exact))
    gap = sum(
        float((a.double() - b.double()).square().sum()) for a, b in zip(found, exact, strict=True)
    )
    return (gap / sum(float(b.double().square().sum()) for b in exact)) ** 0.5


# --------------------------------------------------------------------------------------- parts


def facts():
    """What this machine is, its two ceilings, and whether the scripts import without the rest."""
    if CUDA:
        free, total = (x / 2**30 for x in torch.cuda.mem_get_info())
        print(f"{torch.cuda.get_device_name()}, {free:.0f} of {total:.0f} GiB free")
    print(f"CUDA {torch.version.cuda}, {os.cpu_count()} cores, Python {sys.version.split()[0]}")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r}))\n"
        "import model, rl, pretrain, sft, mix, eval, sample; from data import prepare"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    print("the scripts import without", ", ".join(ABSENT))

    source = torch.randn(on_gpu(1 << 30, 1 << 20), device=DEVICE)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / seconds_of(lambda: target.copy_(source)) / 1e12
    side = on_gpu(8192, 256)
    a = torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16)
    b = torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16)
    product = 2 * side**3 / seconds_of(lambda: a @ b, 20) / 1e12
    print(f"copy {copy:.3g} TB/s, {side}^3 in bf16 {product:.4g} TFLOP/s")
    return {"copy_tb_s": copy, "bf16_tflop_s": product}


def graphs():
    """CUDA graphs of the sampler: replays equal eager steps while rows, lengths and prefix change.

    An RL run does this: training batches, then a validation of other sizes, then training again.
    """
    model = sharper(random_model(torch.float32, vocab=1000))
    captured = Sampler(model, rows=64)
    eager = Sampler(model, rows=64)
    eager.capture = False
    prefix = some_ids(1, (20, 21), 1000)[0]
    worst = 0.0
    seen = 0
    for questions, new, shots in (
        (4, 24, ()),
        (16, 24, ()),
        (16, 24, prefix),
        (16, 150, prefix[:7]),
        (4, 24, ()),
    ):
        prompts = some_ids(questions, (3, 40), 1000, seed=questions)
        request = prompts, 4, new, range(4 * questions), [0, 1, 2], 1.0, shots
        expected = eager(*request)
        for _ in range(3):  # run, capture, replay
            found = captured(*request)
            assert torch.equal(found.tokens, expected.tokens), "a replay draws other tokens"
            worst = max(worst, float((found.logp - expected.logp).abs().max()))
        captured.refresh()
        kept = sum(graph is not None for graph in captured.graphs.values())
        seen = max(seen, kept)
        print(f"{questions:3} x 4 answers of {new}, prefix {len(shots):2}: {kept} graphs")
    assert worst < 1e-4, f"log-probs of replays differ by {worst}"
    assert seen or not CUDA, "nothing was captured"
    reserved = torch.cuda.memory_reserved() / 1e9 if CUDA else 0.0
    return {"graphs": seen, "largest_gap": worst, "reserved_gb": reserved}


def kernels():
    """The Triton kernels of the loss head against fp64, and the same bits twice.

    An error may be 3 times that of plain PyTorch in the same dtype for log-probs and entropy, twice
    for gradients.
    """
    assert network.triton is not None, "triton is not installed"
    if not CUDA:
        network.use_triton = lambda x: x.dtype != torch.float64
    worst = {}
    sizes = on_gpu(
        [(1000, 2048, 100278, 74), (129, 768, 100278, 74), (33, 96, 517, 123)],
        [(33, 40, 150, 20)],
    )
    for size in sizes:
        for dtype, temperature in ((torch.float32, 0.6), (HALF, 1.0)):
            errors = head_errors(*size, dtype, temperature)
            told = ", ".join(f"{name} {share:.2f}" for name, share in errors.items())
            print(f"{size} {str(dtype).removeprefix('torch.')}, error / allowed: {told}")
            worst = {name: max(x, worst.get(name, 0)) for name, x in errors.items()}
    assert max(worst.values()) <= 1, "an error is larger than allowed"
    return worst


def head_errors(N, D, vocab, padding, dtype, temperature) -> dict[str, float]:
    """The largest error of each output of both uses of the head, over what it may be."""
    generator = torch.Generator().manual_seed(N)
    hidden = torch.randn(N, D, generator=generator).to(DEVICE, dtype).requires_grad_()
    head = torch.randn(vocab + padding, D, generator=generator) * 2 / D**0.5
    head[vocab:] = 30 / D  # it would win many a softmax
    head = head.to(dtype).to(DEVICE, torch.float32).requires_grad_()
    target = torch.randint(vocab, (N,), generator=generator).to(DEVICE)
    weight = torch.randn(N, generator=generator).to(DEVICE)

    def known():
        return weighted_nll(hidden, head, target, weight, vocab, temperature)

    def later():
        logp, entropy = log_probs(hidden, head, target, vocab, temperature)
        return -(weight * logp).sum(), logp, entropy

    def plain(dtype):
        """All logits at once, products in `dtype`."""
        logits = hidden.to(dtype) @ head[:vocab].to(dtype).T
        logits = logits.to(torch.promote_types(dtype, torch.float32)) / temperature
        log_p = logits.log_softmax(1)
        logp = log_p.gather(1, target[:, None]).squeeze(1)
        return -(weight * logp).sum(), logp, -(log_p.exp() * log_p).sum(1)

    def measured(outputs):
        """Log-prob, entropy, and the loss' gradients in hidden and head."""
        gradients = torch.autograd.grad(outputs[0], (hidden, head))
        return [x.detach() for x in (*outputs[1:], *gradients)]

    exact = measured(plain(torch.float64))
    usual = measured(plain(dtype))
    found = {"log-prob": 0.0, "entropy": 0.0, "d hidden": 0.0, "d head": 0.0}
    rules = ((3, 1e-5), (3, 1e-5), (2, 1e-4), (2, 1e-4))
    for use in (known, later):
        ours = measured(use())
        assert all(map(torch.equal, ours, measured(use()))), "other bits at the second run"
        assert not ours[-1][vocab:].any(), "the padding has a gradient"
        for place, (name, (factor, room)) in enumerate(zip(found, rules, strict=True)):
            assert ours[place].isfinite().all(), f"{name} is not finite"
            allowed = factor * float((usual[place] - exact[place]).abs().max()) + room
            error = float((ours[place] - exact[place]).abs().max())
            found[name] = max(found[name], error / allowed)
    return found


def token():
    """The sampler's kernels beside plain PyTorch: errors against fp64, the same bits twice, times.

    An error may be 3 times that of plain PyTorch in the same dtype.
    """
    assert network.triton is not None, "triton is not installed"
    figures = {}
    shapes = [dict(questions=8, n=64, S=0), dict(questions=64, n=8, S=700)]
    here = [dict(questions=2, n=3, S=5)]
    for shape in on_gpu(shapes, here):
        for dtype in (HALF, torch.float32):
            name = f"{shape['questions']} x {shape['n']}, prefix {shape['S']}"
            name += f", {str(dtype).removeprefix('torch.')}"
            share, times = attention_of(dtype, **shape)
            told = ", ".join(f"{side} {1e3 * seconds:.3f} ms" for side, seconds in times.items())
            print(f"{name}: error / allowed {share:.2f}, {told}")
            assert share <= 1, "an error is larger than allowed"
            figures[f"{name} faster"] = times["plain"] / times["kernels"]
    R, V = on_gpu((512, 100278), (4, 3000))
    generator = torch.Generator(DEVICE).manual_seed(0)
    logits = torch.randn(R, round_up(V, 128), generator=generator, device=DEVICE).to(HALF) * 2
    logits = logits[:, :V]
    u = torch.rand(R, 1, generator=generator, device=DEVICE, dtype=torch.float64)
    for temperature in (1.0, 0.6, 0.0):
        with_triton(True)
        found, logp = choose(logits, u, temperature)
        expected, exact = choose(logits.double(), u, temperature)
        pairs = zip(logp, exact, strict=True)
        differs = found != expected
        if temperature == 0:  # of equal logits either may be taken
            differs &= logits.gather(1, found) != logits.gather(1, expected)
        others = float(differs.double().mean())
        gap = max(float((a - b)[found == expected].abs().max()) for a, b in pairs)
        kernel = seconds_of(lambda t=temperature: choose(logits, u, t), 20)
        with_triton(False)
        plain = seconds_of(lambda t=temperature: choose(logits, u, t), 20)
        speed = R * V * HALF.itemsize / kernel / 1e12
        print(
            f"draw of {R} at {temperature}: {others:.1%} other ids than fp64, log-probs differ by "
            f"{gap:.1e}; {1e3 * kernel:.3f} ms ({speed:.2f} TB/s), plain {1e3 * plain:.3f}"
        )
        assert others <= 0.05 and gap < 1e-4, "other draws than in fp64"
        figures[f"draw at {temperature} faster"] = plain / kernel
    return figures


def with_triton(wanted: bool):
    """Whether the Triton kernels serve what is not in fp64."""
    network.use_triton = lambda x: wanted and x.dtype != torch.float64


def attention_of(dtype, questions: int, n: int, S: int) -> tuple[float, dict[str, float]]:
    """The error of attend_to_cache over what it may be, and its seconds by kernels, plain, and
    compiled. Of rows of 1B's heads, half of them long, some of each question gone."""
    H, K, T, P = on_gpu((16, 128, 512, 128), (2, 24, 16, 24))
    generator = torch.Generator(DEVICE).manual_seed(n)

    def some(*shape):
        return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)

    def up_to(most, *shape):
        return torch.randint(1, most + 1, shape, generator=generator, device=DEVICE)

    group = torch.arange(questions, device=DEVICE).repeat_interleave(n)
    group = group[torch.arange(len(group), device=DEVICE) % 5 != 3]
    R = len(group)
    length = torch.where(up_to(2, R) == 1, T, up_to(T, R) - 1)
    size = up_to(P, questions)
    mask = torch.where(torch.arange(P, device=DEVICE) < size[:, None, None], 0.0, -torch.inf)
    place = Place(length, None, None, group, mask, length, size)
    prefix = some(2, H, S, K) if S else None
    cache = Cache(some(2, R, H, T, K), some(2, questions, H, P, K), prefix)
    row = some(R, H, K), some(R, H, K), some(R, H, K)

    def exact():
        wide = [None if x is None else x.double() for x in cache]
        return attend_to_cache(*(x.double() for x in row), Cache(*wide), place)

    def work():
        return attend_to_cache(*row, cache, place)

    truth = exact()
    with_triton(False)
    usual = float((work() - truth).abs().max())
    times = {"plain": seconds_of(work, 10)}
    if CUDA:
        compiled = torch.compile(attend_to_cache, dynamic=True)
        times["compiled"] = seconds_of(lambda: compiled(*row, cache, place), 10)
    with_triton(True)
    found = work()
    assert torch.equal(found, work()), "other bits at the second run"
    times["kernels"] = seconds_of(work, 10)
    read = 2 * H * K * dtype.itemsize * int(length.sum())
    print(f"own keys and values: {read / times['kernels'] / 1e12:.2f} TB/s")
    return float((found - truth).abs().max()) / (3 * usual + 1e-5), times


def sampler():
    """The sampler in fp64, compiled or not, draws on a GPU what it draws on a CPU."""
    model = sharper(random_model(torch.float64), 30)
    twin = Model(model.config, torch.float64).to(torch.float64)
    twin.load_state_dict(model.state_dict())
    expected = Sampler(twin, rows=96)
    prefix = some_ids(1, (11, 12), 500)[0]
    worst = 0.0
    requests = [(3, (2, 9), (), 1.0), (24, (2, 9), (), 0.6), (24, (30, 90), prefix, 1.0)]
    requests += [(6, (30, 90), prefix, 0.0)]
    for compiled in (False, True):
        drawn = Sampler(model, rows=96, compile=compiled)
        began = time.monotonic()
        if compiled and not CUDA:
            requests = requests[:1]  # a CPU's compiler is slow
        for questions, lengths, shots, temperature in requests:
            prompts = some_ids(questions, lengths, 500, seed=7)
            request = prompts, 4, 40, range(4 * questions), [0, 1], temperature, shots
            for _ in range(on_gpu(3, 1)):
                found = drawn(*request)
                truth = expected(*request)
                assert torch.equal(found.tokens, truth.tokens), f"other tokens: {request[1:3]}"
                worst = max(worst, float((found.logp - truth.logp).abs().max()))
        seconds = time.monotonic() - began
        print(f"{'compiled' if compiled else 'as it is'}: equal tokens, {seconds:.0f} s in all")
    assert worst < 1e-5, f"log-probs differ by {worst}"
    return {"largest_gap": worst, "compiled_s": seconds}


def bf16():
    """What the sampler says of its tokens in bf16, beside what the trainer says, and fp32."""
    shape = on_gpu(dict(layers=4, width=2048, heads=16, ffn=8192, vocab=100278), {})
    model = sharper(random_model(torch.bfloat16, **shape), 3)
    vocab = model.config.vocab
    prompts = some_ids(8, (20, 100), vocab)
    samples = Sampler(model)(prompts, 8, on_gpu(128, 16), range(64), [vocab])
    each = [prompt for prompt in prompts for _ in range(8)]
    answers = samples.tokens.tolist()
    figures = {}
    with torch.no_grad():
        for name, per_row, compute in (
            ("rows", 1, torch.bfloat16),
            ("tree", 8, torch.bfloat16),
            ("fp32", 1, torch.float32),
        ):
            batch = problems.make_batch(each, answers, [1.0] * 64, 0, samples.logp, per_row)
            batch = batch.to(DEVICE)
            model.compute = compute
            logp, entropy = model(batch.ids, batch.target, mask=batch.mask, layout=batch.layout)
            gap = (logp - batch.logp)[batch.mask].abs()
            figures[f"{name}_mean"] = float(gap.mean())
            figures[f"{name}_max"] = float(gap.max())
            nats = float(entropy[batch.mask].mean())
            mean, most = figures[f"{name}_mean"], figures[f"{name}_max"]
            print(
                f"sampler - trainer ({name}): mean {mean:.4f}, largest {most:.3f}; {nats:.1f} nats"
            )
            assert mean < 0.03, "the sampler samples from another distribution than is trained"
    return figures


def compile_flex(model):
    """Compiled blocks that take FlexAttention; on a CPU by a compiler that generates no code."""
    if CUDA:
        return common.compile_blocks(model)
    for block in model.blocks:
        block.compile(dynamic=True, backend="eager")
    model.takes_blocks = lambda x: True


def tree_layout(rows: int, length: int) -> Layout:
    """Rows of two documents, each a trunk and three branches."""
    place = torch.arange(length, device=DEVICE)
    half = length // 2
    document = (place >= half).long().expand(rows, length).contiguous()
    branch = (place % half * 4 // half).clamp(max=3).expand(rows, length).contiguous()
    return Layout(place.expand(rows, length).contiguous(), document, branch)


def tree_attention() -> dict:
    """FlexAttention with Layout.blocks() in compiled blocks, against SDPA with the dense mask."""
    figures = {}
    shapes = [(3, 200), (3, 208), (2, 640), (4, 136), (7, 128)]
    shapes += on_gpu([(2, 1040), (8, 1800)], [])
    for heads, dtype in ((4, torch.float32), (1, torch.bfloat16)):
        width = 96 if heads == 4 else 128  # the toy's heads of 24, the 1B's of 128
        model = random_model(dtype, width=width, heads=heads, ffn=256)
        dense = random_model(dtype, width=width, heads=heads, ffn=256)
        torch._dynamo.reset()  # all blocks of a process share their code, and its count
        compile_flex(model)
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        worst = 0.0
        for rows, length in shapes:
            generator = torch.Generator().manual_seed(length)
            ids = torch.randint(500, (rows, length), generator=generator).to(DEVICE)
            layout = tree_layout(rows, length)
            found = []
            with contextlib.nullcontext() if CUDA else torch.no_grad():
                for net in (model, dense):
                    net.zero_grad()
                    states = net.hidden(ids, layout)
                    gradients = []
                    if CUDA:
                        (states.float() * (1 + ids[..., None] % 7)).sum().backward()
                        gradients = [p.grad for p in net.blocks.parameters()]
                    found.append((states.detach(), gradients))
            (states, gradients), (exact, exact_gradients) = found
            worst = max(worst, distance(states, exact))
            if CUDA:
                worst = max(worst, distance(gradients, exact_gradients))
        count = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
        name = f"{str(dtype).removeprefix('torch.')}, heads of {width // heads}"
        print(f"{name}: largest difference {worst:.1e}, {count} graphs for {len(shapes)} shapes")
        assert worst < (1e-4 if dtype == torch.float32 else 0.05), "other numbers than SDPA"
        assert count <= len(shapes) // 2, "compiled anew for other shapes"
        figures[f"{name} error"] = worst
    return figures


def tree():
    """Tree rows: the attention, then a training step of rl with 8 answers a row against 1."""
    if not CUDA:
        print("FlexAttention has no backward pass on a CPU: its forward pass alone is checked")
    figures = tree_attention()
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        # to compile takes time, and nothing on a CPU is compiled here
        sides = {(1, CUDA and dtype != torch.float32): "1", (8, CUDA): "8"}
        if CUDA and dtype != torch.float32:
            sides[8, False] = "8_uncompiled"
        seconds = {}
        expected = None
        for (per_row, compiled), side in sides.items():
            gradients, seconds[side], memory = tree_step(dtype, per_row, compiled)
            expected = expected or gradients
            gap = distance(gradients, expected)
            milliseconds = 1e3 * seconds[side]
            print(f"{name}, {side} a row: {milliseconds:.0f} ms, {memory:.1f} GB", end=", ")
            print(f"gradients differ by {gap:.1e}")
            figures[f"{name}_{side}_ms"] = milliseconds
            assert gap < (1e-4 if dtype == torch.float32 else 0.05), "other gradients"
        if dtype != torch.float32:  # there a row an answer is not compiled
            figures = {f"{name}_faster": seconds["1"] / seconds["8"], **figures}
    return figures


def tree_step(dtype, per_row: int, compiled: bool) -> tuple[list, float, float]:
    """Gradients of a step of rl with so many answers a row, its seconds and its GB."""
    torch._dynamo.reset()
    shape = on_gpu(dict(layers=4, width=2048, heads=16, ffn=8192, vocab=32000), {})
    model = random_model(dtype, **shape)
    if compiled:
        common.compile_blocks(model)
    questions, group = on_gpu((4, 64), (2, 8))
    prompts = some_ids(questions, on_gpu((80, 120), (8, 12)), model.config.vocab)
    prompts = [prompt for prompt in prompts for _ in range(group)]
    answers = some_ids(len(prompts), on_gpu((50, 300), (2, 9)), model.config.vocab, seed=1)
    weights = torch.randn(len(prompts), generator=torch.Generator().manual_seed(2)) / 1e4
    batch = problems.make_batch(prompts, answers, weights.tolist(), 0, None, per_row)
    nothing = dict.fromkeys(common.Setup._fields)
    cfg = rl.Config(init="", clip=0.0, answers_per_row=per_row)
    world = common.World(0, 1, DEVICE, dtype)
    run = common.Setup(**nothing | dict(cfg=cfg, world=world, model=model))

    def step():
        return rl.rl_gradients(run, batch, None, None)

    _, gradients, _, _ = step()
    return gradients, seconds_of(step, 3), peak_gb(step)


def scripts():
    """The commands end to end, in the toy world: kill, resume, profile, eval, torchrun, mix."""
    folder = Path(tempfile.mkdtemp())
    try:
        return run_scripts(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_scripts(folder: Path) -> dict:
    """In a line of a command, @NAME is a file or folder of `folder`."""
    figures = {}

    def begun(line: str) -> subprocess.Popen:
        words = [str(folder / word[1:]) if word[0] == "@" else word for word in line.split()]
        with open(folder / "log", "a") as log:
            return subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=log, stderr=log)

    def finished(name: str, line: str):
        began = time.monotonic()
        code = begun(line).wait()
        figures[f"{name}_s"] = time.monotonic() - began
        tail = (folder / "log").read_text().splitlines()[-3:]
        assert code == 0, f"{name} ended with {code}: {' | '.join(tail)}"
        print(f"{name} {figures[name + '_s']:.0f} s", end=", ", flush=True)

    # pretrain.py and the last rl.py compile on a GPU; each time takes half a minute
    how = "--compile false"
    compiled = "--compile " + on_gpu("true", "false")
    steps = on_gpu(600, 50)
    sizes = "--train_questions 64 --val_questions 16 --test_questions 16 --shots 8 --task_items 16"
    length = f"--tokens {1024 * steps} --batch_tokens 1024 --length 64 --warmup 2"
    base = f"@base/step{steps}.pt"
    learn = f"rl.py --init @taught.pt --steps 8 --eval_every 4 --eval_n 8 --save_every 1 {how}"
    learn += on_gpu("", " --questions_per_step 8 --eval_questions 4 --max_new 24")
    finished("prepare", f"data/prepare.py toy --out @toy --tokens {1100 * steps} {sizes}")
    finished("pretrain", f"pretrain.py --data @toy --out @base --doc_mask {length} {compiled}")
    taught = f"--steps {on_gpu(200, 40)} --lr 4e-3 --eval_questions 0"
    finished("sft", f"sft.py --init {base} --out @taught.pt {taught} {how}")
    finished("rl", f"{learn} --out @whole.pt --profile 2")
    assert (folder / "whole.pt.trace.json").exists(), "--profile wrote no trace"

    metrics = folder / "killed.pt.metrics.jsonl"
    run = begun(f"{learn} --out @killed.pt")
    while run.poll() is None and len(losses_of(metrics)) < 3:
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    assert run.wait() == 128 + signal.SIGTERM, f"SIGTERM ended with {run.returncode}"
    stopped = len(losses_of(metrics))
    finished("resumed", f"{learn} --out @killed.pt --resume")
    losses = [losses_of(folder / f"{name}.pt.metrics.jsonl") for name in ("whole", "killed")]
    assert len(losses[0]) == len(losses[1]) == 8, "steps are missing after --resume"
    figures["resume_gap"] = max(abs(a - b) for a, b in zip(*losses, strict=True))
    assert CUDA or figures["resume_gap"] == 0, "--resume gives another run"

    questions = "--limit 8 --n 8 --k 1,8 --max_new 40"
    finished("eval", f"eval.py @whole.pt --results @rows {questions} {how}")
    one_rank = "-m torch.distributed.run --standalone --nproc_per_node 1"
    two_steps = learn.replace("--steps 8", "--steps 2").replace(how, compiled)
    finished("torchrun", f"{one_rank} {two_steps} --out @ranks.pt")
    finished("mix", f"{learn.replace('rl.py', 'mix.py')} --steps 2 --out @mixed.pt")
    rows = (folder / "rows/whole.jsonl").read_text().splitlines()
    gap = figures["resume_gap"]
    print(
        f"killed after {stopped} of 8 steps; losses differ by {gap:.1e}; {len(rows)} rows of eval"
    )
    shown = (folder / "log").read_text().splitlines()
    begin = next(i for i, text in enumerate(shown) if "ms per step" in text)
    print("shares of the time of rl.py:", *shown[begin + 1 : begin + 9], sep="\n")
    return {"resume_gap": figures.pop("resume_gap"), **figures}


def losses_of(metrics: Path) -> list[float]:
    """Of the steps that a run has recorded so far; a line may be half written."""
    if not metrics.exists():
        return []
    lines = [line for line in metrics.read_text().splitlines(keepends=True) if line[-1] == "\n"]
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def loss():
    """The loss head at the 1B model's sizes: both uses, what they consist of, and peers."""
    N, D, vocab = on_gpu((32768, 2048, 100352), (40, 32, 300))
    if not CUDA:
        network.use_triton = lambda x: x.dtype != torch.float64
    generator = torch.Generator(DEVICE).manual_seed(0)
    how = dict(generator=generator, device=DEVICE)
    hidden = torch.randn(N, D, **how).to(on_gpu(torch.bfloat16, torch.float32)).requires_grad_()
    head = (torch.randn(vocab, D, **how) * 2 / D**0.5).requires_grad_()
    target = torch.randint(vocab, (N,), **how)
    weight = torch.full((N,), 1 / N, device=DEVICE)
    figures = {}

    def clear():
        hidden.grad = head.grad = None

    def known():
        clear()
        weighted_nll(hidden, head, target, weight, vocab)[0].backward()

    def later():
        clear()
        (-(weight * log_probs(hidden, head, target, vocab)[0]).sum()).backward()

    @torch.no_grad()
    def forward():
        log_probs(hidden, head, target, vocab)

    def eager():
        clear()
        rows = slice(N // 4)  # all logits at once do not fit: a quarter, counted four times
        logits = (hidden[rows] @ head.to(hidden.dtype).T).float()
        (torch.nn.functional.cross_entropy(logits, target[rows]) / 4).backward()

    peers = [("PyTorch, all logits", eager, 6, 4)]
    if hasattr(torch.nn.functional, "linear_cross_entropy"):

        def fused():
            clear()
            logits = torch.nn.functional.linear_cross_entropy
            logits(hidden, head.to(hidden.dtype), target).backward()

        peers.append(("F.linear_cross_entropy", fused, 6, 1))
    ours = [("weighted_nll", known, 6, 1), ("log_probs", forward, 2, 1)]
    ours.append(("log_probs, backward too", later, 8, 1))
    for name, work, products, times in ours + peers:
        try:
            seconds = seconds_of(work, 3) * times
            memory = peak_gb(work)
        except (RuntimeError, NotImplementedError) as error:  # a peer that fails is a line
            if not any(name == other[0] for other in peers):
                raise
            print(f"{name}: {str(error).splitlines()[0][:80]}")
            continue
        speed = products * N * D * vocab / seconds / 1e12
        print(f"{name:26}{1e3 * seconds:9.2f} ms{speed:8.1f} TFLOP/s{memory:8.2f} GB at most")
        figures[f"{name}_ms"] = 1e3 * seconds
    figures |= loss_pieces(hidden.detach(), head.detach(), target, weight, vocab)
    return figures


def loss_pieces(hidden, head, target, weight, vocab) -> dict:
    """Milliseconds of what a chunk of weighted_nll consists of."""
    rows = min(len(hidden), on_gpu(network.ROWS_CUDA, 32))
    part = hidden[:rows]
    real = head.to(part.dtype)
    logits = part @ real.T
    out = torch.empty(4, rows, device=DEVICE)
    d_hidden = torch.empty_like(part)
    d_head = torch.zeros_like(head)
    settings = vocab, 1.0, 0.0
    row = target[:rows], weight[:rows], out
    pieces = {
        "product": lambda: torch.mm(part, real.T, out=logits),
        "row kernel": lambda: network._launch_rows(logits, *row, *settings),
        "both products back": lambda: network._add_products(logits, real, part, d_hidden, d_head),
    }
    found = {f"{name}_ms": 1e3 * seconds_of(work, 10) for name, work in pieces.items()}
    print(f"of {rows} rows:", *(f"{name} {ms:.3f}" for name, ms in found.items()), sep="  ")
    return found


def decode():
    """Sampling with the 1B model: tokens a second, a token's time at three lengths, its kernels."""
    shape = {k: v for k, v in PRESETS["1b"].items() if k != "context"} | dict(vocab=100278)
    model = random_model(torch.bfloat16, **on_gpu(shape, {}))
    vocab = model.config.vocab
    questions, n, new = on_gpu((8, 64, 512), (2, 8, 24))
    prompts = some_ids(questions, on_gpu((90, 110), (4, 9)), vocab)
    drawn = Sampler(model, rows=questions * n, compile=CUDA)
    rows = questions * n

    def whole():
        drawn(prompts, n, new, range(rows), [vocab])  # an end that is never drawn

    began = time.monotonic()
    whole()
    wait()
    first = time.monotonic() - began
    began = time.monotonic()
    whole()
    wait()
    seconds = time.monotonic() - began
    figures = {"tokens_per_s": rows * new / seconds, "first_call_s": first, "call_s": seconds}
    print(f"{rows} rows x {new}: {rows * new / seconds:,.0f} tokens/s; first call {first:.0f} s")
    weights = sum(p.numel() for p in model.blocks.parameters()) + model.head.weight.numel()
    config = model.config
    column = 2 * config.layers * config.width * model.compute.itemsize
    for length in on_gpu((64, 256, 512), (8, 16, 24)):
        seconds = token_seconds(drawn, rows, length, prompts)
        own = length - min(drawn.span, length) / 2  # columns, on average over the tokens timed
        bytes_read = 2 * weights + column * (rows * own + questions * max(map(len, prompts)))
        speed = bytes_read / seconds / 1e12
        figures[f"ms_at_{length}"] = 1e3 * seconds
        print(f"column {length}: {1e3 * seconds:.2f} ms a token, {speed:.2f} TB/s of what is read")
    for name, ms in largest_kernels(lambda: token_seconds(drawn, rows, length, prompts), 9):
        print(f"{ms:9.3f} ms  {name[:80]}")
    return figures


@torch.fx.experimental._config.patch(use_duck_shape=False)
@torch.inference_mode()
def token_seconds(drawn: Sampler, rows: int, length: int, prompts) -> float:
    """Seconds of a token when the rows' own cache has `length` columns, after a whole call."""
    step = Step(
        rows=rows,
        max_new=drawn.buffers.sizes[3] - drawn.SPARE,
        columns=round_up(length, drawn.span),
        prompt=round_up(max(map(len, prompts)), drawn.span),
        prefix=0,
        temperature=1.0,
        ends=(drawn.model.config.vocab,),
    )
    count = min(drawn.span, length) - 4
    for _ in range(2):  # at a whole call's graphs, or the first capture
        drawn.buffers.t.fill_(length - count - 4)
        drawn.buffers.alive.fill_(True)
        for _ in range(2):
            drawn._advance(step)
        wait()
        began = time.perf_counter()
        for _ in range(count):
            drawn._advance(step)
        wait()
        seconds = (time.perf_counter() - began) / count
    return seconds


def largest_kernels(work, count: int) -> list[tuple[str, float]]:
    """(name, milliseconds in all) of the kernels that take the most; on a CPU the operators."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if CUDA else []
    with torch.profiler.profile(activities=activities) as profiler:
        work()
    on_device = torch.autograd.DeviceType.CUDA if CUDA else torch.autograd.DeviceType.CPU
    found = [e for e in profiler.key_averages() if e.device_type == on_device]

    def spent(event):
        return (event.self_device_time_total if CUDA else event.self_cpu_time_total) / 1e3

    return [(e.key, spent(e)) for e in sorted(found, key=spent, reverse=True)[:count]]


def training():
    """Steps of the 1B model: long rows, documents in them, and rows of RL whose length changes."""
    shape = {k: v for k, v in PRESETS["1b"].items() if k != "context"} | dict(vocab=100278)
    model = random_model(torch.bfloat16, **on_gpu(shape, {}), context=4096)
    optimizer = adam(model)
    world = common.World(0, 1, DEVICE, torch.bfloat16)
    figures = {}

    def step(rows: int, length: int, layout=None):
        generator = torch.Generator(DEVICE).manual_seed(length)
        size = (rows, length)
        ids = torch.randint(model.config.vocab, size, generator=generator, device=DEVICE)
        weight = torch.full(size, 1 / (rows * length), device=DEVICE)
        model(ids, ids.roll(-1, 1), weight=weight, z_loss=1e-9, layout=layout)[0].backward()
        gradients, _ = common.gradients(model, world, 1.0)
        update(model, [(optimizer, 1e-6, gradients)], 0.1)

    def told(name: str, work, rows: int, length: int, count: int = 3):
        memory = peak_gb(work)
        seconds = seconds_of(work, count)
        speed = rows * length / seconds
        flops = speed * model.flops_per_token(length)
        figures[f"{name}_mfu"] = flops / 989e12 if CUDA else 0.0
        figures[f"{name}_ms"] = 1e3 * seconds
        figures[f"{name}_gb"] = memory
        print(
            f"{name}: {rows} x {length}, {1e3 * seconds:.0f} ms, {speed:,.0f} tokens/s, "
            f"{flops / 989e12:.1%} of 989 TFLOP/s, {memory:.1f} GB"
        )

    rows, length = on_gpu((2, 4096), (2, 64))
    if CUDA:
        common.compile_blocks(model, dynamic=False)
    told("long rows", lambda: step(rows, length), rows, length)
    layout = tree_layout(rows, length)
    layout = layout._replace(branch=torch.zeros_like(layout.branch))
    told("two documents", lambda: step(rows, length, layout), rows, length)
    if CUDA:
        torch._dynamo.reset()
        common.compile_blocks(model)
    many, short = on_gpu((32, 352), (4, 16))
    told("short rows", lambda: step(many, short), many, short)
    for other in (short + 8, short + 48):
        times = []
        for _ in range(2):
            wait()
            began = time.perf_counter()
            step(many, other)
            wait()
            times.append(time.perf_counter() - began)
        print(
            f"{many} x {other}: {1e3 * times[0]:.0f} ms the first time, then {1e3 * times[1]:.0f}"
        )
        figures[f"first_{other}_ms"] = 1e3 * times[0]
    return figures


# ------------------------------------------------------------------------------------ the record

PARTS = {
    part.__name__: part
    for part in (
        facts,
        graphs,
        kernels,
        token,
        bf16,
        sampler,
        tree,
        scripts,
        loss,
        decode,
        training,
    )
}


def table(out: Path):
    """Print the table of all parts of a run; exit status 1 if one is not well."""
    lines = (out / "parts.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    print(f"\n{'part':10}{'status':10}{'seconds':>8}   figures")
    for row in rows:
        figures = [f"{name} {value:.4g}" for name, value in row["figures"].items()][:4]
        told = row.get("why") or ", ".join(figures)
        print(f"{row['part']:10}{row['status']:10}{row['seconds']:8.0f}   {told[:90]}")
    whole = sum(row["seconds"] for row in rows)
    print(f"{'all':10}{'':10}{whole:8.0f}   {out}/parts.jsonl has all figures")
    if not any(row.get("measured") for row in rows):
        print("There is no GPU here: nothing was measured, the lines were tried at a toy size.")
    raise SystemExit(any(row["status"] != "well" for row in rows))


def main():
    name, out = sys.argv[1], Path(sys.argv[2])
    if name == "table":
        table(out)
    began = time.monotonic()
    row = {"part": name, "status": "well", "seconds": 0.0, "measured": CUDA}
    row["device"] = torch.cuda.get_device_name() if CUDA else "CPU"
    row["torch"] = str(torch.__version__)
    row["triton"] = getattr(network.triton, "__version__", None)
    row["figures"] = {}
    try:
        row["figures"] = PARTS[name]()
    except BaseException as error:
        row["status"] = "failed"
        row["why"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise
    finally:
        row["seconds"] = time.monotonic() - began
        with open(out / "parts.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()

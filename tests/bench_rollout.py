"""Rollouts: tokens a second beside transformers' `generate` and beside the machine's ceiling.

    python tests/bench_rollout.py [--json]                      CPU: the default world's model
    python tests/bench_rollout.py --preset 1b [--json]          CUDA, bfloat16, random weights

Same weights and prompts on both sides. On the CPU every answer has all its tokens. On CUDA the
lengths come from a seeded table (a geometric law with a mean of 200, at most 512), the end token of
a row is forced at its length, and each engine does the same work. The sides take turns; a ratio is
the median over turns. --batches defaults to what the memory that is free has room for, on both
sides at once.

The ceiling is what a step of one token cannot do without: the matrix products of the blocks and
the head, and one read of the cache's bytes (own columns of each row, prompts once per question),
each measured alone on the same shapes in the same run.
"""

import statistics
from typing import NamedTuple

import torch

import bench
from model import Model, Sampler, free_bytes
from twin import transformers_twin

WANTED = {"cpu": (64, 512, 2048), "cuda": (64, 256, 512, 1024)}


class Shape(NamedTuple):
    prompt: int  # tokens of each
    new: int  # tokens of the longest answer
    group: int  # answers to a prompt


SMALL, LARGE = Shape(24, 32, 8), Shape(100, 512, 8)


class Forced(Sampler):
    """Answers end where `lengths` says, and the steps are counted."""

    lengths = None
    steps = 0

    def _advance(self, *how):
        self.steps += 1
        super()._advance(*how)

    def _draw(self, x, rows, step):
        super()._draw(x, rows, step)
        b = self.buffers
        b.alive[rows] &= b.t[rows] + 2 < self.lengths[b.slot[rows]]


def median_of(work, device, count=9) -> float:
    """Median seconds of one call, after two that are not counted."""
    seconds = []
    for _ in range(count + 2):
        began = bench.clock(device)
        work()
        seconds.append(bench.clock(device) - began)
    return statistics.median(seconds[2:])


def ceiling(model, rows: int, shape: Shape, own: int, device) -> tuple[float, float]:
    """Seconds a step: its matrix products; one read of its cache with `own` columns a row."""
    c = model.config
    like = dict(dtype=model.compute, device=device)
    sizes = [(c.width, 3 * c.width), (c.width, c.width), (c.width, 2 * c.ffn), (c.ffn, c.width)]
    each = [  # each layer reads its own weights
        [(torch.randn(rows, i, **like), torch.randn(o, i, **like)) for i, o in sizes]
        for _ in range(c.layers)
    ]
    head = (torch.randn(rows, c.width, **like), torch.randn(c.vocab, c.width, **like))
    products = [pair for layer in each for pair in layer] + [head]
    outputs = {len(w): torch.empty(rows, len(w), **like) for _, w in products}

    def multiply():
        for x, w in products:
            torch.mm(x, w.T, out=outputs[len(w)])

    columns = rows * own + rows // shape.group * shape.prompt
    cache = torch.zeros(c.layers, 2 * c.width * columns, **like)
    return median_of(multiply, device), median_of(lambda: cache.sum(1), device)


def fitting(model, shape: Shape, device: str) -> list[int]:
    """Numbers of rows that both sides have room for at once; at least one."""
    c = model.config
    column = 2 * c.layers * c.width * model.compute.itemsize  # keys and values of a token
    # a cache on either side, which transformers copies; logits and what is made of them
    row = 3 * column * (shape.prompt + shape.new) + 40 * c.padded_vocab
    most = 0.8 * free_bytes(torch.device(device)) / row
    found = [rows for rows in WANTED[device] if rows <= most]
    return found or [max(shape.group, int(most) // shape.group * shape.group)]


def generate(twin, ids, lengths, shape: Shape, end: int):
    """The answers by transformers: row r ends, with the id `end`, after lengths[r] tokens."""

    def forced(ids_BT, scores):
        over = ids_BT.shape[1] - shape.prompt + 1 >= lengths
        scores = scores.masked_fill(over[:, None], -torch.inf)
        scores[:, end] = torch.where(over, 0.0, -torch.inf)
        return scores

    how = dict(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=shape.new)
    if ids.is_cuda:
        how["cache_implementation"] = "static"
    with torch.inference_mode():
        twin.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            eos_token_id=end,
            pad_token_id=end,
            logits_processor=[forced],
            **how,
        )


class Measured(NamedTuple):
    """Tokens per second of both; seconds of our step of one token, and of what bounds it."""

    ours: float
    theirs: float
    ratio: float
    step: float
    products: float
    reading: float
    waste: float

    @property
    def share(self) -> float:
        return (self.products + self.reading) / self.step


def measure(sampler: Forced, twin, batch: int, shape: Shape, count: int) -> Measured:
    model = sampler.model
    device = sampler.embed.device
    vocab = model.config.vocab
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (batch // shape.group, shape.prompt), generator=generator)
    lengths = torch.full((batch,), shape.new)
    if shape == LARGE:
        drawn = torch.empty(batch).geometric_(1 / 200, generator=generator)
        lengths = drawn.clamp(1, shape.new).long()
    sampler.lengths = lengths.to(device)
    waste = []

    def ours():
        sampler.steps = 1  # the first token comes from the prompt
        never = [vocab]
        samples = sampler(ids.tolist(), shape.group, shape.new, list(range(batch)), never)
        waste.append(samples.waste)

    expanded = ids.repeat_interleave(shape.group, 0).to(device)

    def theirs():
        generate(twin, expanded, sampler.lengths, shape, vocab - 1)

    seconds, others, ratio = bench.turns(ours, theirs if twin else None, count, device)
    products, reading = ceiling(model, batch, shape, shape.new // 2, device)
    done = int(lengths.sum())
    step = seconds / sampler.steps
    return Measured(done / seconds, done / others, ratio, step, products, reading, waste[-1])


def main():
    flags = bench.parser(__doc__, turns=7)
    flags.add_argument("--preset", default="toy", help="size of the model (model.py)")
    flags.add_argument("--batches", help="answers sampled side by side, 64,512 for instance")
    args = flags.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = SMALL if args.preset.startswith("toy") else LARGE
    compute = torch.bfloat16 if device == "cuda" else torch.float32
    model = Model(bench.config_of(args.preset), compute).init_weights(0).to(device).eval()
    absent = bench.missing("transformers")
    twin = None if absent else transformers_twin(model).eval().to(device, compute)
    sampler = Forced(model, rows=1 << 20, compile=True)
    batches = args.batches.split(",") if args.batches else fitting(model, shape, device)
    figures = {}
    rows = []
    for batch in map(int, batches):
        try:
            found = measure(sampler, twin, batch, shape, args.turns)
        except torch.OutOfMemoryError as problem:
            rows.append([f"{batch}", bench.why(problem)])
            continue
        figures[f"tokens_per_s_b{batch}"] = round(found.ours)
        figures[f"vs_transformers_b{batch}"] = round(found.ratio, 3)
        figures[f"ceiling_share_b{batch}"] = round(found.share, 3)
        figures["waste"] = round(found.waste, 3)
        rows.append(line_of(batch, found))
    rows += [["transformers", absent]] if absent else []
    size = sum(p.numel() for p in model.parameters())
    bench.show(
        f"{bench.machine(device)}, {args.preset} model of {size:,} parameters, {compute}, "
        f"prompts of {shape.prompt} and answers of at most {shape.new} tokens; tokens per second",
        "rows ours generate ratio ms-a-step products cache of-ceiling waste".split(),
        rows,
    )
    bench.finish(args, figures)


def line_of(batch: int, found: Measured) -> list:
    return [
        f"{batch}",
        bench.number(found.ours),
        bench.number(found.theirs),
        bench.number(found.ratio, ".2f"),
        bench.number(1e3 * found.step, ".2f"),
        bench.number(1e3 * found.products, ".2f"),
        bench.number(1e3 * found.reading, ".2f"),
        bench.number(found.share, ".0%"),
        bench.number(found.waste, ".1%"),
    ]


if __name__ == "__main__":
    main()

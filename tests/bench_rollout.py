"""Rollouts: tokens a second beside transformers' `generate`, and beside the ceiling of the machine, in one run.

    python tests/bench_rollout.py [--json]                                   CPU: the default world's model, 64, 512, 2048 rows
    python tests/bench_rollout.py --preset 1b --batches 128,512,1024 [--json]     CUDA, bfloat16, random weights

Same weights and prompts on both sides. On the CPU every answer has NEW tokens; on CUDA the lengths come from a seeded table
(a geometric law with a mean of 200, cut at 512), the end token of a row is forced at its length, and each engine does the
same work. The sides take turns, and a ratio is the median over the turns.

The ceiling is what a step of one token cannot do without: the matrix products of the blocks and the head, and one read of the
cache's bytes (own columns of each row, prompts once a question), each measured alone on the same shapes in the same run.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from bench_cpu import transformers_twin, turns  # noqa: E402

from data import tokens  # noqa: E402
from model import PRESETS, Model, ModelConfig, Sampler  # noqa: E402


class Forced(Sampler):
    """Answers end where `lengths` says, and the steps are counted."""

    lengths, steps = None, 0

    def _advance(self, *shape):
        self.steps += 1
        super()._advance(*shape)

    def _draw(self, x, temperature, ends):
        super()._draw(x, temperature, ends)
        b = self.buffers
        b.alive[: len(x)] &= b.t + 2 < self.lengths[b.row[: len(x)]]


def median_of(work, device, count=9) -> float:
    """Median seconds of one call."""
    seconds = []
    for _ in range(count + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


def ceiling(model, rows: int, group: int, prompt: int, own: int, device) -> tuple[float, float]:
    """Seconds a step: its matrix products; one read of its cache with `own` columns a row."""
    c, dtype = model.config, model.compute
    shapes = [(c.width, 3 * c.width), (c.width, c.width), (c.width, 2 * c.ffn), (c.ffn, c.width)]
    products = [(torch.randn(rows, i, dtype=dtype, device=device), torch.randn(o, i, dtype=dtype, device=device)) for i, o in shapes]
    head = torch.randn(rows, c.width, dtype=dtype, device=device), torch.randn(c.vocab, c.width, dtype=dtype, device=device)
    outputs = [torch.empty(rows, len(w), dtype=dtype, device=device) for _, w in [*products, head]]
    weights = [[w.clone() for _, w in products] for _ in range(c.layers)]  # each layer reads its own

    def multiply():
        for layer in weights:
            for (x, _), w, out in zip(products, layer, outputs[:-1], strict=True):
                torch.mm(x, w.T, out=out)
        torch.mm(head[0], head[1].T, out=outputs[-1])

    cache = torch.zeros(c.layers, 2 * c.width * (rows * own + rows // group * prompt), dtype=dtype, device=device)
    return median_of(multiply, device), median_of(lambda: cache.sum(1), device)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--preset", default="toy", help="size of the model (model.py)")
    parser.add_argument("--batches", default="64,512,2048", help="answers sampled side by side")
    parser.add_argument("--turns", type=int, default=7, help="turns of each side")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    large = args.preset != "toy"
    vocab = tokens.VOCABULARY["cl100k_base" if large else "toy"]
    config = ModelConfig(**PRESETS[args.preset], vocab=vocab, padded_vocab=-(-vocab // 128) * 128)
    model = Model(config, torch.bfloat16 if device == "cuda" else torch.float32).init_weights(0).to(device).eval()
    prompt, new, group, end = (100, 512, 8, vocab - 1) if large else (24, 32, 8, vocab - 1)
    twin = transformers_twin(model).eval().to(device, model.compute)
    sampler, table, figures = Forced(model, rows=1 << 20, compile=True), [], {}
    for batch in map(int, args.batches.split(",")):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocab, (batch // group, prompt), generator=generator)
        lengths = torch.full((batch,), new)
        if large:
            lengths = (torch.empty(batch).geometric_(1 / 200, generator=generator)).clamp(1, new).long()
        expanded, done = ids.repeat_interleave(group, 0).to(device), int(lengths.sum())
        sampler.lengths, waste = lengths.to(device), []

        def ours(ids=ids, batch=batch, waste=waste):
            sampler.steps = 1  # the first token comes from the prompt
            waste.append(sampler(ids.tolist(), group, new, list(range(batch)), [vocab]).waste)  # an end that is never drawn

        def theirs(expanded=expanded, lengths=sampler.lengths):
            def forced(ids_BT, scores):
                over = ids_BT.shape[1] - prompt + 1 >= lengths
                scores = scores.masked_fill(over[:, None], -torch.inf)
                scores[:, end] = torch.where(over, 0.0, -torch.inf)
                return scores

            with torch.inference_mode():
                twin.generate(expanded, attention_mask=torch.ones_like(expanded), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
                              max_new_tokens=new, eos_token_id=end, pad_token_id=end, logits_processor=[forced],
                              **({"cache_implementation": "static"} if device == "cuda" else {}))  # fmt: skip
            if device == "cuda":
                torch.cuda.synchronize()

        a, b, ratio = turns(ours, theirs, args.turns)
        steps = sampler.steps
        products, reading = ceiling(model, batch, group, prompt, new // 2, device)
        table.append((batch, done / a, done / b, ratio, a / steps, products, reading, waste[-1]))
        figures[f"vs_transformers_b{batch}"] = round(ratio, 3)
        figures[f"ceiling_share_b{batch}"] = round((products + reading) / (a / steps), 3)
    figures["waste"] = round(table[-1][-1], 3)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    size = sum(p.numel() for p in model.parameters())
    print(f"torch {torch.__version__}, {name}, {args.preset} model of {size:,} parameters, {model.compute}, prompt {prompt}, "
          f"answers {'of 1 to' if large else 'of'} {new} tokens")  # fmt: skip
    print(f"{'rows':>6}{'ours':>12}{'generate':>12}{'ratio':>8}{'ms a step':>11}{'products':>10}{'cache':>8}{'of ceiling':>12}{'waste':>8}")
    for batch, ours_, theirs_, ratio, step, products, reading, waste in table:
        print(f"{batch:6}{ours_:12,.0f}{theirs_:12,.0f}{ratio:8.2f}{1e3 * step:11.2f}{1e3 * products:10.2f}{1e3 * reading:8.2f}"
              f"{(products + reading) / step:12.0%}{waste:8.1%}")  # fmt: skip
    if args.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()

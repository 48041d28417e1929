"""Seconds for the six benchmarks, beside lm-evaluation-harness on the same items where it is installed, in one run.

    RL_DATASETS=FOLDER python tests/bench_tasks.py [CHECKPOINT] [--items 200] [--json]

Without a checkpoint: random weights in the toy's shape, with the whole cl100k_base vocabulary. Both sides have the same weights,
tokenise the texts and score every choice; lm-eval (tests/requirements-slow.txt) does it in transformers, --batch choices at a
time. Tokens are those of each context once and of its choices. The sides take turns, and a ratio is the median over the turns.
"""

import argparse
import functools
import json
import os
from importlib.util import find_spec

import torch
from bench_cpu import turns
from helpers import DATASETS
from test_tasks import chosen, harness
from tqdm import tqdm

import eval as evaluation
from data import checkpoint, ranks, tasks, tokens
from model import PRESETS, Model, ModelConfig, Sampler


def lm_eval_on(model, batch):
    """-> items -> log-likelihoods, by lm-eval's own model class."""
    from lm_eval.api.instance import Instance

    lm = harness(model)
    lm.batch_size_per_gpu, lm.softmax_dtype, lm._device = (
        batch,
        None,
        model.embed.weight.device,
    )  # not as exact, but as fast as it is
    lm.model.to(lm._device, model.compute)

    def measure(items):
        texts = [(item["context"], choice) for item in items for choice in item["choices"]]
        return lm.loglikelihood(
            [Instance("loglikelihood", {}, text, 0) for text in texts], disable_tqdm=True
        )

    return measure


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?", help="one with the cl100k_base encoding")
    parser.add_argument(
        "--items", type=int, default=200, help="of each benchmark, spread over it (0: all)"
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=1,
        help="choices that lm-eval scores at a time; 1 is its fastest on a CPU",
    )
    parser.add_argument(
        "--turns", type=int, default=3, help="turns of each side, after one that is not counted"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object as the last line"
    )
    args = parser.parse_args()
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(DATASETS / "tiktoken"))
    enc, world = tokens.encoding("cl100k_base"), ranks.start()
    if args.checkpoint:
        saved = checkpoint.load(args.checkpoint)
        if saved["meta"]["encoding"] != enc.name:
            parser.error(
                f"{args.checkpoint} knows {saved['meta']['encoding']}, the benchmarks are texts for {enc.name}"
            )
        model = checkpoint.load_model(saved, Model, ModelConfig, world)
    else:
        model = ranks.place(
            Model(ModelConfig(**PRESETS["toy"]), world.compute).init_weights(0), world
        )
    sampler = Sampler(model.eval())
    logliks = functools.partial(evaluation.continuation_log_probs, sampler, world=world)
    peer, rows = lm_eval_on(model, args.batch) if find_spec("lm_eval") else None, []
    for name in tqdm(tasks.BENCHMARKS, leave=False):
        items = list(tasks.read(name, DATASETS))
        items = [items[i] for i in chosen(items, min(args.items or len(items), len(items)))]
        pairs = [
            (tasks.encode_pair(enc, item["context"], choice), i)
            for i, item in enumerate(items)
            for choice in item["choices"]
        ]
        count = sum(len(choice) for (_, choice), _ in pairs) + sum(
            {i: len(context) for (context, _), i in pairs}.values()
        )
        a, b, ratio = turns(
            lambda items=items: tasks.score(items, enc, logliks),
            lambda items=items: peer and peer(items),
            args.turns,
        )
        rows.append((name, len(items), count, a, b, ratio))
    _, items, count, a, b, _ = zip(*rows, strict=True)
    rows.append(("all", sum(items), sum(count), sum(a), sum(b), sum(b) / sum(a)))
    size = sum(p.numel() for p in model.parameters())
    name = args.checkpoint or "random weights"
    print(
        f"{name}, {size:,} parameters, {model.compute} on {world.device}, {torch.get_num_threads()} threads"
    )
    print(
        f"{'':16}{'items':>8}{'seconds':>9}{'items/s':>9}{'tokens/s':>10}{'lm-eval, s':>12}{'ratio':>8}"
    )
    for name, items, count, a, b, ratio in rows:
        told = f"{b:12.2f}{ratio:8.2f}" if peer else f"{'-':>12}{'-':>8}"
        print(f"{name:16}{items:8,}{a:9.2f}{items / a:9.1f}{count / a:10,.0f}{told}")
    if args.json:
        figures = {f"items_per_s_{name}": round(items / a, 2) for name, items, _, a, *_ in rows}
        print(json.dumps(figures | ({"vs_lm_eval": round(rows[-1][-1], 3)} if peer else {})))


if __name__ == "__main__":
    main()

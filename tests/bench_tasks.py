"""Seconds for the six benchmarks of general capability, beside lm-evaluation-harness.

    RL_DATASETS=FOLDER python tests/bench_tasks.py [CHECKPOINT] [--items 200] [--json]

Without a checkpoint: random weights in the toy's shape, with the whole cl100k_base vocabulary. Both
sides have the same weights and items, tokenise the texts and score every choice; lm-eval
(tests/requirements-slow.txt) does it in transformers, --batch choices at a time. Tokens are those
of each context once and of its choices. The sides take turns, and a ratio is the median over turns.
"""

import functools
import os

from tqdm import tqdm

import bench
import common
import eval as evaluation
from data import tasks, tokens
from helpers import DATASETS
from model import PRESETS, Model, ModelConfig
from test_tasks import chosen, harness


def lm_eval_on(model, batch):
    """-> items -> log-likelihoods, by lm-eval's own model class."""
    from lm_eval.api.instance import Instance

    lm = harness(model)
    # not as exact as in the tests, but as fast as it is
    lm.batch_size_per_gpu = batch
    lm.softmax_dtype = None
    lm._device = model.embed.weight.device
    lm.model.to(lm._device, model.compute)

    def measure(items):
        texts = [(item["context"], choice) for item in items for choice in item["choices"]]
        asked = [Instance("loglikelihood", {}, text, 0) for text in texts]
        return lm.loglikelihood(asked, disable_tqdm=True)

    return measure


def model_of(args, encoding, world) -> Model:
    if not args.checkpoint:
        model = Model(ModelConfig(**PRESETS["toy"]), world.compute)
        return common.materialize(model, world).init_weights(0)
    saved = common.load(args.checkpoint)
    known = saved["meta"]["encoding"]
    if known != encoding.name:
        raise SystemExit(
            f"{args.checkpoint} knows {known}, the benchmarks are texts for {encoding.name}"
        )
    return common.load_model(saved, world)


def length_of(items, encoding) -> int:
    """Tokens: each context once, and its choices."""
    count = 0
    for item in items:
        pairs = [tasks.encode_pair(encoding, item["context"], x) for x in item["choices"]]
        count += len(pairs[-1][0]) + sum(len(choice) for _, choice in pairs)
    return count


def main():
    flags = bench.parser(__doc__, turns=3)
    flags.add_argument("checkpoint", nargs="?", help="one with the cl100k_base encoding")
    flags.add_argument("--items", type=int, default=200, help="of each, spread over it (0: all)")
    flags.add_argument("--batch", type=int, default=1, help="choices that lm-eval scores at a time")
    args = flags.parse_args()
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(DATASETS / "tiktoken"))
    encoding = tokens.encoding("cl100k_base")
    world = common.start()
    model = model_of(args, encoding, world).eval()
    score = functools.partial(evaluation.continuation_log_probs, model, world=world)
    absent = bench.missing("lm_eval")
    peer = None if absent else lm_eval_on(model, args.batch)
    measured = []
    for name in tqdm(tasks.BENCHMARKS, leave=False):
        items = list(tasks.read(name, DATASETS))
        items = [items[i] for i in chosen(items, min(args.items or len(items), len(items)))]
        ours = functools.partial(tasks.score, items, encoding, score)
        theirs = functools.partial(peer, items) if peer else None
        found = bench.turns(ours, theirs, args.turns, world.device)
        measured.append((name, len(items), length_of(items, encoding), *found))
    _, items, count, first, second, _ = map(list, zip(*measured, strict=True))
    total = (sum(items), sum(count), sum(first), sum(second), sum(second) / sum(first))
    measured.append(("all", *total))
    size = sum(p.numel() for p in model.parameters())
    bench.show(
        f"{args.checkpoint or 'random weights'}, {size:,} parameters, {model.compute}, "
        f"{bench.machine(world.device)}",
        ["", "items", "seconds", "items/s", "tokens/s", "lm-eval, s", "ratio"],
        [line_of(*row) for row in measured] + ([["lm-eval", absent]] if absent else []),
    )
    figures = {f"items_per_s_{name}": round(n / a, 2) for name, n, _, a, *_ in measured}
    bench.finish(args, figures | {"vs_lm_eval": round(total[-1], 3)})


def line_of(name, items, count, ours, theirs, ratio) -> list:
    pairs = [(items, ","), (ours, ".2f"), (items / ours, ".1f"), (count / ours, ",.0f")]
    return [name, *(bench.number(*pair) for pair in [*pairs, (theirs, ".2f"), (ratio, ".2f")])]


if __name__ == "__main__":
    main()

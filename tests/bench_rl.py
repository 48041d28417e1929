"""Where the time of an RL step goes: sampling, reward, forward with log-probs, backward, update.

    python tests/bench_rl.py ckpt/toy/step1367-sft.pt [--steps 10] [--compile false] [--json]

Real steps from a real checkpoint (answers end where they end), with the flags' defaults; nothing is written.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

import rl  # noqa: E402
from data import checkpoint, problems, ranks, run, tokens  # noqa: E402
from model import Model, ModelConfig, Sampler, adam, update  # noqa: E402


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument(
        "--steps", type=int, default=10, help="steps that are timed, after two that are not"
    )
    parser.add_argument("--compile", default="true", help="as in rl.py")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object as the last line"
    )
    args = parser.parse_args()
    world, saved = ranks.start(), checkpoint.load(args.checkpoint)
    model, meta = checkpoint.load_model(saved, Model, ModelConfig, world), saved["meta"]
    sizes = rl.SIZES["toy" if meta["preset"].startswith("toy") else "paper"]
    cfg = run.fill(rl.Config(init=args.checkpoint), {"questions": meta["questions"], **sizes})
    enc, rows = tokens.encoding(meta["encoding"]), problems.load(cfg.questions, "train")
    compiled = args.compile == "true" and ranks.can_compile(world)
    sampler, optimizer, spent, sampled = Sampler(model, cfg.rows, compiled), adam(model), [], 0
    if compiled:
        ranks.compile_blocks(model)

    def clock():
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    for step in range(args.steps + 2):
        began = clock()
        batch, stats = rl.rl_batch(sampler, rows, enc, cfg, step, world)
        seconds = {
            "sampling": stats["sample_seconds"],
            "reward": stats["grade_seconds"],
            "forward, log-probs": 0.0,
            "backward": 0.0,
        }
        for piece in problems.micro_batches(batch, cfg.micro, world):
            start = clock()
            loss = model(
                piece.ids, weight=piece.weight, mask=piece.mask, temperature=cfg.temperature
            )[0]
            half = clock()
            loss.backward()
            seconds["forward, log-probs"] += half - start
            seconds["backward"] += clock() - half
        start = clock()
        update(
            model,
            [(optimizer, cfg.lr, ranks.gradients(model, world, cfg.clip)[0])],
            cfg.weight_decay,
        )
        sampler.refresh()
        seconds["update"] = clock() - start
        seconds["the rest"] = clock() - began - sum(seconds.values())
        if step >= 2:
            spent.append(seconds)
            sampled += stats["sampled_tokens"]
    total = {name: sum(x[name] for x in spent) / args.steps for name in spent[0]}
    whole = sum(total.values())
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {world.device}; {cfg.questions_per_step} questions x "
          f"{cfg.group} answers, {sampled / args.steps:.0f} tokens sampled a step; {1e3 * whole:.0f} ms a step")  # fmt: skip
    for name, value in total.items():
        print(f"{name:20}{1e3 * value:8.0f} ms{value / whole:8.0%}")
    if args.json:
        print(
            json.dumps(
                {name: round(value / whole, 3) for name, value in total.items()}
                | {"ms_a_step": round(1e3 * whole, 1)}
            )
        )


if __name__ == "__main__":
    main()

"""Rollouts and a training step beside the same model in transformers, on this CPU, in one run.

    python tests/bench_cpu.py [--json]

The default world's model, fp32: bench_rollout.py with 64 and 512 rows, and bench_pretrain.py.
"""

import json
import subprocess
import sys
from pathlib import Path

import bench
from bench import transformers_twin  # noqa: F401  tests of transformers' form take it from here


def run(script: str, *flags) -> dict:
    """The figures of another benchmark."""
    command = [sys.executable, str(Path(__file__).with_name(script)), "--json", *flags]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    args = bench.parser(__doc__, turns=7).parse_args()
    same = ["--turns", str(args.turns)]
    figures = {}
    rows = []
    rollout = run("bench_rollout.py", "--batches", "64,512", *same)
    for batch in (64, 512):
        ratio = rollout[f"vs_transformers_b{batch}"]
        figures[f"rollout_vs_transformers_b{batch}"] = ratio
        speed = rollout[f"tokens_per_s_b{batch}"]
        rows.append(
            [
                f"rollout, {batch} rows, 24 + 32 tokens",
                bench.number(speed),
                bench.number(ratio, ".2f"),
            ]
        )
    step = run("bench_pretrain.py", "--device", "cpu", *same)
    speed = step["sides"]["ours"]["tokens_per_s"]
    ratio = figures["train_vs_transformers"] = step["vs_transformers"]
    rows.append(["training step, 8 x 128 tokens", bench.number(speed), bench.number(ratio, ".2f")])
    absent = bench.missing("transformers")
    rows += [["transformers", absent]] if absent else []
    bench.show(f"{bench.machine()}, the toy model", ["", "tokens/s", "times transformers"], rows)
    bench.finish(args, figures)


if __name__ == "__main__":
    main()

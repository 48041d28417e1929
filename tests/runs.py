"""A short run of each trainer, its record, and the check that --resume ends in the same bits."""

import json
from pathlib import Path

from faults import ran
from helpers import PRETRAIN, call, flags, same_weights

VALIDATION = dict(eval_every=3, eval_questions=4, eval_n=2)
RL = dict(
    questions_per_step=4,
    group=8,
    max_new=32,
    steps=6,
    save_every=2,
    lr=1e-3,
    compile="false",
    **VALIDATION,
)
STAGES = {
    "pretrain": dict(tokens=6 * 1024, save_every=2, eval_every=3),
    "sft": dict(batch=8, steps=6, save_every=2, max_new=24, warmup=2, **VALIDATION),
    "rl": RL,
    "mix": RL | dict(batch=8, sft_warmup=2),
}
CLOCK = {"seconds", "step_seconds", "sample_seconds", "grade_seconds", "tokens_per_s"}


def words_of(stage, world, out, **changes) -> list[str]:
    """The flags of a run of `stage` that writes the checkpoint `out` (step6.pt for pretrain)."""
    settings = STAGES[stage] | changes
    if stage == "pretrain":
        return flags(*PRETRAIN, data=world.data, out=Path(out).parent, **settings)
    return flags(init=world.taught, out=out, **settings)


def record(out) -> list[dict]:
    """A run's metrics without what depends on the clock."""

    def timeless(line):
        return {name: value for name, value in line.items() if name not in CLOCK}

    text = Path(f"{out}.metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, object_hook=timeless) for line in text.splitlines()]


def steps_of(out) -> list[int]:
    return [line["step"] for line in record(out) if "loss" in line]


def goes_on(stage, whole, world, out, words=None):
    """--resume ends where the uninterrupted run ends.

    That is: weights bit for bit, each line of the metrics, nothing left behind.
    """
    words = words or words_of(stage, world, out)
    assert ran(lambda: call(stage, *words, "--resume")) == 0
    assert same_weights(out, whole(stage))
    assert record(out) == record(whole(stage))
    there = sorted(path.name for path in out.parent.iterdir())
    answers = [f"{out.name}.answers.jsonl"] if stage != "pretrain" else []
    assert there == [out.name, *answers, f"{out.name}.metrics.jsonl"]
    for name in answers:
        assert (out.parent / name).read_bytes() == (whole(stage).parent / name).read_bytes()

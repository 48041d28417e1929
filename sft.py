"""Supervised fine-tuning on solutions: M_t -> M_t^SFT (--solutions 1) or M_t^SFT-Gold (--solutions all).

    python sft.py --init ckpt/toy/step3418.pt
    torchrun --nproc_per_node 8 sft.py --init ckpt/1b/step5000.pt --solutions all

Next-token loss on the answer and its end token, each of the batch's n answer tokens weighs 1/n; the prompt weighs 0.
"""

import functools
import time
from dataclasses import dataclass
from typing import Literal

from torch.profiler import record_function

from data import checkpoint, problems, ranks, run, tokens
from eval import solve
from model import Model, ModelConfig, Sampler, adam, cosine, update

SIZES = {
    "toy": dict(batch=16, lr=1e-3, max_new=56),
    "paper": dict(batch=64, lr=2e-5, max_new=512),  # the paper gives neither
}


@dataclass(frozen=True)
class Config:
    init: str  # checkpoint to start from
    out: str | None = None  # checkpoint to write (default: INIT-RECIPE.pt, with a --seed INIT-RECIPE-s1.pt)
    recipe: str = ""  # its name in files, rows and reports (default: sft, or sft-gold for all solutions)
    questions: str | None = None  # folder with train.jsonl and val.jsonl (default: what the checkpoint names)
    solutions: str = "1"  # solutions a question: 1 (the realistic case) or all (SFT-Gold)
    epochs: float = 5.0  # paper: 5, "10 add nothing"
    steps: int = 0  # train for so many steps instead (0: what --epochs makes)
    limit: int = 0  # use only the first so many training questions (0: all)
    batch: int | None = None  # solutions a step, over all ranks (toy 16)
    micro: int = 64  # rows a forward pass; never changes the result
    lr: float | None = None  # peak learning rate, cosine to a tenth (toy 1e-3; decides how much is forgotten)
    warmup: int = 10  # steps of linear warm-up
    weight_decay: float = 0.0  # off: a few hundred steps are not what decay is for
    clip: float = 1.0  # largest gradient norm (0: any)
    on_nonfinite: Literal["stop", "skip"] = "stop"  # a loss or gradient that is no number, or a spike: stop, or skip the update
    spike: float = 0.0  # standard deviations above the last 128 steps that make a spike (0: none does; OLMo2: 6)
    max_new: int | None = None  # longest answer when the validation questions are answered (toy 56; its hard questions need 84)
    eval_every: int = 0  # steps between validations (0: only before and after)
    eval_questions: int = 20  # validation questions; 0 to skip validation
    eval_n: int = 32  # answers to each
    save_every: int = 100  # steps between states for --resume
    save_minutes: float = 30.0  # minutes between them at most; a SIGTERM or SIGINT saves one too
    compile: bool = False  # torch.compile the blocks: pays for runs of several minutes
    checkpoint_activations: bool = False  # keep only the blocks' inputs, run each block again when going backward: less memory, slower
    shard: bool = False  # split weights, gradients and moments over the ranks (FSDP2), for what one GPU cannot hold
    rows: int = 512  # answers sampled side by side; never changes the result
    seed: int = 0  # which solution of a question, and the order
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # auto: bfloat16 on CUDA, float32 on the CPU
    profile: int = 0  # profile so many steps: OUT.trace.json for Perfetto or chrome://tracing, and the shares of a step's time (0: none)
    resume: bool = False  # go on from the last saved state; starts afresh if there is none
    overwrite: bool = False  # replace what is there


def tokenise(enc, rows, solutions: str, seed: int, form=problems.Form()) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, answer ids) of every solution that is trained on, the end token with it."""
    if solutions != "all" and not (solutions.isdigit() and int(solutions)):
        raise ValueError(f"--solutions takes a whole number from 1, or all, not {solutions!r}")
    pairs = problems.solution_pairs(rows, solutions, seed)
    return [(tokens.encode(enc, problems.prompt(form, question)), problems.answer_ids(enc, text)) for question, text in pairs]


@record_function("data")
def sft_batch(pairs, pad: int, batch: int, seed: int, step: int, world) -> problems.Batch:
    """This rank's rows of SFT step `step`: every answer token of the whole batch weighs 1/n, whichever rank has it."""
    chosen = [pairs[i] for i in problems.shuffled(len(pairs), batch, seed, step)]
    n = sum(len(answer) for _, answer in chosen)
    mine = chosen[world.share(batch, "--batch")]
    return problems.make_batch([p for p, _ in mine], [a for _, a in mine], [1 / n] * len(mine), pad)


def sft_backward(model, batch, cfg, world):
    """Add the gradient of the batch to the model's; -> the loss of this rank's share, a tensor."""
    loss = 0.0
    for micro in problems.micro_batches(batch, cfg.micro, world):
        part, *_ = model(micro.ids, weight=micro.weight, mask=micro.mask)
        with record_function("backward"):
            part.backward()
        loss += part.detach().double()  # read by the caller: to read here is to wait for the GPU
    return loss


def main(cfg):
    name = cfg.recipe or {"1": "sft", "all": "sft-gold"}.get(cfg.solutions, f"sft-{cfg.solutions}")
    cfg, world, model, parent, state = run.begin(cfg, name, SIZES, Model, ModelConfig)
    enc = tokens.encoding(parent["encoding"])
    if not cfg.steps and cfg.epochs <= 0:
        raise ValueError("--epochs must be above 0, or --steps")
    rows = problems.load(cfg.questions, "train")[: cfg.limit or None]
    held_out = problems.load(cfg.questions, "val")[: cfg.eval_questions] if cfg.eval_questions else []
    pairs, pad = tokenise(enc, rows, cfg.solutions, cfg.seed, problems.form(cfg.questions)), tokens.pad_id(enc)
    steps = cfg.steps or max(1, round(cfg.epochs * len(pairs) / cfg.batch))

    optimizer = adam(model)
    first = checkpoint.resume(state, optimizer)
    compiled = cfg.compile and ranks.can_compile(world)
    sampler = Sampler(model, cfg.rows, compiled) if held_out else None
    if compiled:
        ranks.compile_blocks(model)
    log = run.Log(cfg.out, world, steps, state, "loss")

    def validate(step):
        if held_out:
            sampler.refresh()
            log.add(step, validation=solve(sampler, enc, held_out, cfg.eval_n, cfg.max_new, 0.6, cfg.seed, world, form=problems.form(cfg.questions)))

    def save(done):
        checkpoint.save_state(cfg.out, model, checkpoint.child_meta(cfg, parent, "sft", name, done), done, [optimizer], log)

    for step in run.loop(first, steps, cfg, world, save):
        if step == 0 or (cfg.eval_every and step % cfg.eval_every == 0):
            validate(step)
        began = time.time()
        batch = sft_batch(pairs, pad, cfg.batch, cfg.seed, step, world)
        loss = world.sum(sft_backward(model, batch, cfg, world))[0]
        grads, norm = ranks.gradients(model, world, cfg.clip)
        batch_rows = functools.partial(problems.shuffled, len(pairs), cfg.batch, cfg.seed, step)
        if log.healthy(step, cfg, batch_rows, dict(loss=loss, gradient_norm=norm)):
            update(model, [(optimizer, cosine(step, steps, cfg.lr, cfg.warmup), grads)], cfg.weight_decay)
        size = batch.mask.shape[1]  # padding counts as work done
        costs = dict(flops=cfg.batch * size * model.flops_per_token(size), questions=cfg.batch, seconds=time.time() - began)
        answer_tokens = int(world.sum(float(batch.mask.sum()))[0])
        log(step, costs, loss=loss, gradient_norm=norm, tokens=answer_tokens, tokens_per_s=answer_tokens / costs["seconds"])
    validate(steps)
    checkpoint.save(cfg.out, model, checkpoint.child_meta(cfg, parent, "sft", name, steps))
    log.close()
    checkpoint.finish(cfg.out)


if __name__ == "__main__":
    run.main(main, Config, __doc__)

"""Started by test_ranks.py under torchrun: many runs in one start of the processes.

A start costs seconds. The argument is JSON, [[folder to work in, what, words], ...]; what is a
script or a function of this file.
"""

import json
import os
import shutil
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

import common  # noqa: E402
import helpers  # noqa: E402
from model import Model, ModelConfig, Sampler, adam, update  # noqa: E402

# among the sizes are some that divide neither by 2 nor by 4
CONFIG = ModelConfig(layers=2, width=36, heads=2, ffn=51, vocab=37, padded_vocab=61, context=96)
PROMPT = [1, 2, 3]


def save_state(cfg, model, meta, optimizers, log, step, real=common.save_state):
    real(cfg, model, meta, optimizers, log, step)
    if common.is_first():
        shutil.copy(f"{cfg.out}.resume", f"{cfg.out}.{step}")  # for a test to go on from


def on_meta(world):
    with torch.device("meta"):
        return Model(CONFIG, world.compute)


def parts(dtype):
    """What a rank holds of a sharded model, and that nothing is lost on the way in and out."""
    world = common.start("cpu", dtype, shard=True)
    plain = Model(CONFIG, world.compute).init_weights(3, 0.5)
    model = common.materialize(on_meta(world), world).init_weights(3, 0.5, common.put)
    for (name, p), whole in zip(model.named_parameters(), plain.parameters(), strict=True):
        # bit for bit, on any number of ranks
        assert torch.equal(p.full_tensor().to(whole.dtype), whole), name
        assert p.to_local().shape[0] <= -(-whole.shape[0] // world.size)
    held = sum(p.to_local().numel() for p in model.parameters())
    assert held < 1.2 * sum(p.numel() for p in plain.parameters()) / world.size
    model = saved_and_loaded(model, plain, world)
    trained_and_sampled(model, plain, world)


def saved_and_loaded(model, plain, world):
    common.save("a.pt", model, {"encoding": "toy"})
    dist.barrier()
    again = common.load("a.pt")
    for name, p in plain.named_parameters():  # the file is whole
        assert torch.equal(again["model"][name].to(p.dtype), p), name
    return common.load_model(again, world)


def trained_and_sampled(model, plain, world):
    rows = torch.arange(30).view(3, 10)
    ids, target = rows[:, :-1], rows[:, 1:]
    model.checkpoint_activations = True
    with torch.no_grad():
        # bit for bit: bf16 is for the products and not for the angles of the positions
        plain.to(next(model.parameters()).dtype)
        assert torch.equal(model(ids, target)[0], plain(ids, target)[0])
    optimizer = adam(model)
    sampler = Sampler(model)
    addresses = [w.data_ptr() for w in sampler.model.parameters()]
    for _ in range(2):
        model(ids, target, weight=torch.full((3, 9), 0.1))[0].backward()
        assert all(p.grad.to_local().shape == p.to_local().shape for p in model.parameters())
        update(model, [(optimizer, 0.1, common.gradients(model, world, 1.0)[0])], 0.1)
    sampler.refresh()
    assert addresses == [w.data_ptr() for w in sampler.model.parameters()]
    for (name, p), copy in zip(model.named_parameters(), sampler.model.parameters(), strict=True):
        assert copy.dtype == (p.dtype if name == "norm.weight" else world.compute)
        assert torch.equal(copy, p.full_tensor().to(copy.dtype)), name
    # the trainer sees what the sampler samples from, in the last bits of bf16, too
    samples = sampler([PROMPT], 4, 6, range(4), [99])
    said = torch.cat([torch.tensor([PROMPT]).expand(4, 3), samples.tokens], 1)
    with torch.no_grad():
        logp = model(said[:, :-1], said[:, 1:])[0][:, 2:].float()
    bound = {torch.bfloat16: 0.05, torch.float32: 1e-5, torch.float64: 1e-6}[world.compute]
    assert float((logp - samples.logp).abs().mean()) < bound
    resumed(model, optimizer)


def resumed(model, optimizer):
    """Moments go to the rank that has the weights."""
    names = ("exp_avg", "exp_avg_sq")
    state = {}
    for i, p in enumerate(model.parameters()):
        whole = {name: optimizer.state[p][name].full_tensor() for name in names}
        state[i] = {"step": torch.tensor(2.0), **whole}
    fresh = adam(model)
    saved = {"optimizers": [{"state": state}], "model": {}, "step": 2}
    assert common.resume(saved, fresh) == 2
    for p in model.parameters():
        for name in names:
            mine = fresh.state[p][name].to_local()
            assert torch.equal(mine, optimizer.state[p][name].to_local())


def dies(how, script, *words):
    """A run that ends in step 3: rank 1 is killed, or rank 0 cannot write.

    Meanwhile the other rank waits for the gradients.
    """
    world = common.start("cpu")
    real = common.gradients
    calls = []
    Path(f"process{world.rank}").write_text(str(os.getpid()))

    def full(*_):
        Path("died").write_text(str(time.time()))
        raise OSError(28, "No space left on device")

    def gradients(*arguments):
        calls.append(arguments)
        if len(calls) == 3 and world.rank == 1:
            Path("died").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    if how == "killed":
        common.gradients = gradients
    elif world.rank == 0:
        torch.save = full
    helpers.call(script, *words)


def main():
    common.save_state = save_state
    common.join_ranks("gloo")
    # one group for all runs; between two, a rank must not read what rank 0 still writes
    leave = dist.destroy_process_group
    dist.destroy_process_group = dist.barrier
    for folder, what, words in json.loads(sys.argv[1]):
        os.chdir(folder)
        if what in globals():
            globals()[what](*words)
        else:
            helpers.call(what, *words)
    # no run made a group of its own, whose ranks would not wait two hours for each other
    (group,) = dist.distributed_c10d._world.pg_map
    assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(hours=2)
    leave()


if __name__ == "__main__":
    main()

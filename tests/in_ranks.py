"""Started by test_ranks.py under torchrun: many runs in one start of the processes, which costs seconds. Its argument is
JSON, [[folder to work in, script or function below, words], ...]."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

import helpers  # noqa: E402

from data import checkpoint, ranks  # noqa: E402
from model import Model, ModelConfig, Sampler, adam, update  # noqa: E402


def save_state(out, model, meta, step, *rest, real=checkpoint.save_state):
    real(out, model, meta, step, *rest)
    if ranks.first():
        shutil.copy(f"{out}.resume", f"{out}.{step}")  # kept for a test to go on from


def parts(dtype):
    """What a rank holds of a sharded model, and that nothing is lost on the way in and out, whatever the sizes."""
    world = ranks.start("cpu", dtype, shard=True)
    config = ModelConfig(layers=2, width=36, heads=2, ffn=50, vocab=37, padded_vocab=61, context=96)  # nothing divides by 4
    plain = Model(config).init_weights(3, 0.5)
    with torch.device("meta"):
        model = Model(config, world.compute)
    ranks.place(model, world).init_weights(3, 0.5, ranks.put)
    for (name, p), whole in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.full_tensor().to(whole.dtype), whole), name  # bit for bit, on any number of ranks
        assert p.to_local().shape[0] <= -(-whole.shape[0] // world.size)
    held = sum(p.to_local().numel() for p in model.parameters())
    assert held < 1.2 * sum(p.numel() for p in plain.parameters()) / world.size

    checkpoint.save("a.pt", model, {"encoding": "toy"})
    dist.barrier()
    again = checkpoint.load("a.pt")
    assert all(torch.equal(again["model"][name].to(p.dtype), p) for name, p in plain.named_parameters())  # the file is whole
    with torch.device("meta"):
        model = Model(config, world.compute)
    checkpoint.fill_model(model, again, world)
    model.checkpoint_activations, plain.compute, ids = True, world.compute, torch.arange(30).view(3, 10)
    with torch.no_grad():  # bit for bit: bf16 is for the products and not for the angles of the positions
        assert torch.equal(model(ids)[0], plain.to(next(model.parameters()).dtype)(ids)[0])

    optimizer, sampler = adam(model), Sampler(model)
    addresses = [w.data_ptr() for w in sampler.model.parameters()]
    for _ in range(2):
        model(ids, weight=torch.full((3, 9), 0.1))[0].backward()
        assert all(p.grad.to_local().shape == p.to_local().shape for p in model.parameters())
        update(model, [(optimizer, 0.1, ranks.gradients(model, world, 1.0)[0])], 0.1)
    sampler.refresh()
    for (name, p), copy in zip(model.named_parameters(), sampler.model.parameters(), strict=True):
        assert copy.dtype == (p.dtype if name == "norm.weight" else world.compute)
        assert torch.equal(copy, p.full_tensor().to(copy.dtype)), name
    assert addresses == [w.data_ptr() for w in sampler.model.parameters()]
    # the trainer sees what the sampler samples from, in the last bits of bf16, too
    samples = sampler([[1, 2, 3]], 4, 6, range(4), [99])
    said = torch.cat([torch.tensor([[1, 2, 3]]).expand(4, 3), samples.tokens], 1)
    with torch.no_grad():
        logp = model(said)[0][:, 2:].float()
    assert float((logp - samples.logp).abs().mean()) < {"bfloat16": 0.05, "float32": 1e-5, "float64": 1e-6}[dtype]

    moments = {name: [optimizer.state[p][name].full_tensor() for p in model.parameters()] for name in ("exp_avg", "exp_avg_sq")}
    kept = [{"state": {i: {"step": torch.tensor(2.0)} | {name: x[i] for name, x in moments.items()} for i in range(len(optimizer.state))}}]
    fresh = adam(model)
    assert checkpoint.resume({"optimizers": kept, "model": {}, "step": 2}, fresh) == 2
    for p in model.parameters():
        assert all(torch.equal(fresh.state[p][name].to_local(), x.to_local()) for name, x in optimizer.state[p].items() if name != "step")


def dies(how, script, *words):
    """A run that ends in step 3: rank 1 is killed while the others wait for its gradients, or rank 0 cannot write."""
    world, real, calls = ranks.start("cpu"), ranks.gradients, []
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
        ranks.gradients = gradients
    elif world.rank == 0:
        torch.save = full
    helpers.call(script, *words)


if __name__ == "__main__":
    checkpoint.save_state = save_state
    dist.init_process_group("gloo")
    dist.destroy_process_group, leave = dist.barrier, dist.destroy_process_group  # one group for all
    for folder, what, words in json.loads(sys.argv[1]):
        os.chdir(folder)
        globals()[what](*words) if what in globals() else helpers.call(what, *words)
    leave()

"""Training steps by hand, in float64, to compare the trainers with."""

import numpy as np
import torch
import torch.nn.functional as F

import common

DOUBLE = common.World(0, 1, torch.device("cpu"), torch.float64)
LENGTH = 64  # of helpers.PRETRAIN


def load(path):
    return common.load_model(common.load(path), DOUBLE)


def clipped_gradients(model):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    taken = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return taken


class HandMadeAdam:
    """Kingma & Ba, algorithm 1; -> the update of each parameter at learning rate 1."""

    def __init__(self):
        self.m = 0
        self.v = 0
        self.t = 0

    def __call__(self, taken):
        g = torch.cat([x.flatten() for x in taken])
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.95 * self.v + 0.05 * g * g
        self.t += 1
        m = self.m / (1 - 0.9**self.t)
        v = self.v / (1 - 0.95**self.t)
        parts = (-m / (v.sqrt() + 1e-8)).split([x.numel() for x in taken])
        return [part.view_as(x) for part, x in zip(parts, taken, strict=True)]


def windows(world, first, count, seed=0):
    """Windows first, first + 1, ... of the first epoch's order, from the shard's raw bytes.

    -> (count, LENGTH + 1)
    """
    ids = np.fromfile(world.data / "train_000.bin", "<u2", offset=64).astype(np.int64)
    order = np.random.default_rng([seed, 0]).permutation((len(ids) - 1) // LENGTH)
    chosen = order[first : first + count]
    rows = [ids[i * LENGTH : i * LENGTH + LENGTH + 1] for i in chosen]
    return torch.from_numpy(np.stack(rows))


def cross_entropy(model, ids, z_loss=0.0):
    """The mean over all tokens, with all logits at once."""
    head = model.head.weight[: model.config.vocab]
    logits = model.hidden(ids[:, :-1]).flatten(0, 1) @ head.T
    squares = logits.logsumexp(1).square().mean()
    return F.cross_entropy(logits, ids[:, 1:].flatten()) + z_loss * squares


def difference(path, model) -> float:
    """The largest between the weights of a checkpoint and those of a model."""
    found = common.load(path)["model"]
    return max(
        float((found[name] - p.detach()).abs().max()) for name, p in model.named_parameters()
    )

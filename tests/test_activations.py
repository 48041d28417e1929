"""--checkpoint_activations: less is kept for the backward pass, and no gradient is another."""

import pytest
import torch
import torch.distributed as dist

import common
from eval import layout_of
from helpers import ALONE, small_model
from model import Model


def gradients(model, rows, kept, layout):
    """Gradients of all weights, and the bytes that were kept for the backward pass."""
    model.checkpoint_activations = kept
    held = []
    keep = torch.autograd.graph.saved_tensors_hooks(
        lambda x: held.append(x.nbytes) or x, lambda x: x
    )
    with keep:
        ids, target = rows[:, :-1], rows[:, 1:]
        loss, *_ = model(ids, target, weight=torch.full(ids.shape, 0.01), layout=layout)
    loss.backward()
    taken = [common.whole_tensor(p.grad).clone() for p in model.parameters()]
    model.zero_grad()
    return taken, sum(held)


def sharded(model):
    whole = model.state_dict()
    with torch.device("meta"):
        model = Model(model.config)
    common.materialize(model, ALONE._replace(shard=True))
    with torch.no_grad():
        for name, p in model.named_parameters():
            common.put(p, whole[name])
    return model


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("how", ["eager", "documents", "compiled", "sharded"])
def test_checkpointed_activations_change_no_gradient(how, one_rank):
    """Bit for bit."""
    model = small_model(dtype=torch.float32, layers=4)
    rows = torch.randint(36, (4, 65), generator=torch.Generator().manual_seed(0))
    layout = None
    if how == "documents":
        layout = layout_of(rows.numpy(), end=7)
    if how == "compiled":
        for block in model.blocks:
            block.compile(backend="aot_eager", dynamic=False)
    if how == "sharded":
        model = sharded(model)
    plain, many = gradients(model, rows, False, layout)
    again, few = gradients(model, rows, True, layout)
    assert all(g.any() for g in plain)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    # these hooks do not see what a compiled block keeps
    assert few < many / 2 or how == "compiled"

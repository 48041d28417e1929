"""--doc_mask: attention and positions stay inside a document."""

import itertools

import pytest
import torch

import common
from data import tokens
from eval import layout_of
from helpers import PRETRAIN, call, metrics, small_model

END = 36  # the id that ends a document of small_model


def packed():
    """Two rows of 24 inputs and a target, and their documents as (row, first, end).

    Each document's last token is END. One has a single token, one fills its row, one goes on
    after it.
    """
    rows = torch.randint(END, (2, 25), generator=torch.Generator().manual_seed(0))
    rows[0, [6, 7, 15]] = END
    rows[1, 23] = END
    return rows, [(0, 0, 7), (0, 7, 8), (0, 8, 16), (0, 16, 24), (1, 0, 24)]


def test_the_end_token_belongs_to_the_document_it_ends():
    rows, documents = packed()
    position, document, branch = layout_of(rows.numpy(), END)
    assert position.shape == (2, 24) and not branch.any()
    for row, first, end in documents:
        assert position[row, first:end].tolist() == [*range(end - first)]
        assert (document[row] == document[row, first]).nonzero().flatten().tolist() == [
            *range(first, end)
        ]
    encoding = tokens.encoding("toy")
    assert tokens.encode_document(encoding, " the")[-1] == encoding.eot_token


def test_a_document_in_a_packed_row_is_as_if_alone():
    """Log-probs and gradients, in fp64."""
    model = small_model()
    rows, documents = packed()
    ids, target = rows[:, :-1], rows[:, 1:]
    generator = torch.Generator().manual_seed(1)
    weight = torch.rand(2, 24, generator=generator, dtype=torch.float64)
    loss, logp, _ = model(ids, target, weight=weight, layout=layout_of(rows.numpy(), END))
    loss.backward()
    together = [p.grad.clone() for p in model.parameters()]
    assert (model(ids, target)[0] - logp).abs().max() > 0.1
    model.zero_grad()
    for row, first, end in documents:
        some = (slice(row, row + 1), slice(first, end))
        part, alone, _ = model(ids[some], target[some], weight=weight[some])
        part.backward()
        torch.testing.assert_close(logp[some], alone, atol=1e-10, rtol=0)
    for p, gradient in zip(model.parameters(), together, strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=1e-10, rtol=1e-10)


def test_one_document_a_row_is_plain_attention():
    model = small_model()
    rows, _ = packed()
    ids, target = rows[:, :-1], rows[:, 1:]
    layout = layout_of(rows.numpy(), end=99)
    plain = model(ids, target)[0]
    torch.testing.assert_close(model(ids, target, layout=layout)[0], plain, atol=1e-12, rtol=0)


def test_doc_mask_in_training_and_in_the_held_out_loss(world, tmp_path):
    """The held-out loss of a --doc_mask run is that of each document alone."""
    found = {}
    for mask in ("true", "false"):
        how = dict(doc_mask=mask, micro=5, dtype="float64", tokens=2 * 1024)
        call("pretrain", *PRETRAIN, data=world.data, out=tmp_path / mask, **how)
        found[mask] = metrics(tmp_path / mask / "step2.pt", "loss", "held_out")[-1]
    assert found["true"][1] != found["false"][1]
    alone = common.World(0, 1, torch.device("cpu"), torch.float64)
    model = common.load_model(common.load(tmp_path / "true" / "step2.pt"), alone)
    model.requires_grad_(False)
    end = tokens.encoding("toy").eot_token
    total = 0.0
    for row in torch.from_numpy(tokens.Stream(world.data, "val", 64, 0).beginning(4)):
        ends = [i + 1 for i, token in enumerate(row[:-1].tolist()) if token == end]
        bounds = sorted({0, *ends, 64})
        assert len(bounds) > 2
        for first, last in itertools.pairwise(bounds):
            some = row[None, first : last + 1]
            total -= float(model(some[:, :-1], some[:, 1:])[0].sum())
    # weights are saved in fp32
    assert found["true"][2] == pytest.approx(total / (4 * 64), abs=1e-6)

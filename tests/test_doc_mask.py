"""--doc_mask: attention and positions stay inside a document."""

import numpy as np
import pytest
import torch
from helpers import PRETRAIN, call, metrics, small_model

import common
from data import tokens
from model import attend

END = 36  # the id that ends a document of small_model


def packed():
    """Two rows of 24 inputs and a target, and their documents as (row, first, end).

    Each document's last token is END. One has a single token, one fills its row, one goes on
    after it.
    """
    ids = torch.randint(END, (2, 25), generator=torch.Generator().manual_seed(0))
    ids[0, [6, 7, 15]] = END
    ids[1, 23] = END
    return ids, [(0, 0, 7), (0, 7, 8), (0, 8, 16), (0, 16, 24), (1, 0, 24)]


def starts_of(ids):
    return torch.from_numpy(tokens.document_starts(ids.numpy(), END))


def test_the_end_token_belongs_to_the_document_it_ends():
    ids, documents = packed()
    starts = tokens.document_starts(ids.numpy(), END)
    assert starts.tolist() == [24 * row + first for row, first, _ in documents] + [48]
    assert starts.dtype == np.int32
    encoding = tokens.encoding("toy")
    assert tokens.encode_document(encoding, " the")[-1] == encoding.eot_token


def test_a_document_in_a_packed_row_is_as_if_alone():
    """Log-probs and gradients, in fp64."""
    model = small_model()
    ids, documents = packed()
    generator = torch.Generator().manual_seed(1)
    weight = torch.rand(2, 24, generator=generator, dtype=torch.float64)
    loss, logp, _ = model(ids, weight=weight, starts=starts_of(ids))
    loss.backward()
    together = [p.grad.clone() for p in model.parameters()]
    assert (model(ids)[0] - logp).abs().max() > 0.1
    model.zero_grad()
    for row, first, end in documents:  # the token after it is a target of its last one
        one = ids[row : row + 1, first : end + 1]
        part, alone, _ = model(one, weight=weight[row : row + 1, first:end])
        part.backward()
        torch.testing.assert_close(logp[row, first:end], alone[0], atol=1e-10, rtol=0)
    for p, gradient in zip(model.parameters(), together, strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=1e-10, rtol=1e-10)


def test_one_document_a_row_is_plain_attention():
    model = small_model()
    ids, _ = packed()
    starts = torch.tensor([0, 24, 48], dtype=torch.int32)
    torch.testing.assert_close(model(ids, starts=starts)[0], model(ids)[0], atol=1e-12, rtol=0)


def test_the_flash_kernel_is_given_the_same_documents(monkeypatch):
    """The CUDA path up to the kernel: its layout, its documents, its causal window.

    The kernel itself is replaced by attention over each document.
    """
    plain = torch.nn.functional.scaled_dot_product_attention

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size):
        assert cu_q.dtype == torch.int32 and cu_k is cu_q
        assert max_q == max_k >= int(cu_q.diff().max())
        out = []
        for first, end in zip(cu_q.tolist(), cu_q.tolist()[1:], strict=False):
            parts = (y[first:end].transpose(0, 1) for y in (q, k, v))  # (H, T, K)
            out.append(plain(*parts, is_causal=window_size == (-1, 0)).transpose(0, 1))
        return torch.cat(out)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    ids, documents = packed()
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 24, 8, generator=generator, dtype=torch.float64)
    seen = torch.zeros(2, 1, 24, 24, dtype=torch.bool)
    for row, first, end in documents:
        size = end - first
        seen[row, 0, first:end, first:end] = torch.ones(size, size, dtype=torch.bool).tril()
    found = attend(q, k, v, starts_of(ids))
    torch.testing.assert_close(found, attend(q, k, v, seen), atol=1e-12, rtol=0)


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
    stream = tokens.Stream(world.data, "val", 64, 0)
    total = 0.0
    for ids in torch.from_numpy(stream.beginning(4)).split(1):
        bounds = tokens.document_starts(ids.numpy(), tokens.encoding("toy").eot_token).tolist()
        assert len(bounds) > 2
        for first, end in zip(bounds, bounds[1:], strict=False):
            total -= float(model(ids[:, first : end + 1])[0].detach().sum())
    # weights are saved in fp32
    assert found["true"][2] == pytest.approx(total / (4 * 64), abs=1e-6)

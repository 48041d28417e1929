"""What a step never waits for: numbers on a GPU before its decision, and text from the disk."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pretrain
import rl
from data import problems, tokens
from helpers import ALONE, PRETRAIN, Operations, call, metrics, refused, small_model


class Reads(Operations):
    """Counts what makes the host wait for a GPU: numbers taken out of a tensor."""

    def __init__(self, monkeypatch):
        super().__init__()
        real = torch.Tensor.tolist
        counted = self.count
        monkeypatch.setattr(torch.Tensor, "tolist", lambda x: counted.update(["tolist"]) or real(x))

    @property
    def total(self):
        return self.count["aten::_local_scalar_dense"] + self.count["tolist"]


# -------------------------------------------------------------------------------- host waits


def test_a_step_reads_two_numbers_whatever_its_parts(world, tmp_path, monkeypatch):
    """The norm and the loss, after the last backward pass."""

    def reads(steps, micro):
        how = dict(tokens=steps * 1024, micro=micro, eval_every=0, verify="false")
        with monkeypatch.context() as patch, Reads(patch) as found:
            call("pretrain", *PRETRAIN, "--overwrite", data=world.data, out=tmp_path, **how)
        return found.total

    for micro in (16, 2):
        assert reads(5, micro) - reads(3, micro) == 2 * 2, micro


def test_rl_reads_its_sums_once(monkeypatch):
    """The tokens of the step before its micro-batches, everything else after them."""
    rows = [[1, 2, 3, 4]] * 8
    batch = problems.make_batch(rows, rows, [0.1, -0.1] * 4, 0, [[-1.0] * 4] * 8)
    totals = []
    for micro in (8, 1):
        cfg = rl.Config(init="", micro=micro)
        run = SimpleNamespace(cfg=cfg, world=ALONE, model=small_model(dtype=torch.float32))
        parts = list(problems.micro_batches(batch, micro, ALONE))
        with monkeypatch.context() as patch, Reads(patch) as found:
            patch.setattr(problems, "micro_batches", lambda *_, parts=parts, **__: parts)
            _, _, _, known = rl.rl_gradients(run, batch, None, None)
        totals.append(found.total)
    assert len(parts) == 8 and totals[0] == totals[1] <= 8
    assert known["mismatch_max"] > known["mismatch"] > 0


# --------------------------------------------------------------------------- text read ahead


def test_text_comes_in_order_and_one_step_ahead(world):
    stream = tokens.Stream(world.data, "train", 64, 0)
    made = []
    second = threading.Event()

    def make(step):
        made.append((step, threading.current_thread() is threading.main_thread()))
        if step == 4:
            second.set()
        return stream.rows(step, 8)

    batches = tokens.ahead(make, 3, 7)
    first = next(batches)
    # the next batch is made while this one is in use, and no more than the next
    assert second.wait(10) and made == [(3, False), (4, False)]
    for step, rows in enumerate([first, *batches], 3):
        assert np.array_equal(rows, stream.rows(step, 8))
    assert [step for step, _ in made] == [3, 4, 5, 6] and list(tokens.ahead(make, 5, 5)) == []


def test_an_error_while_reading_ahead_has_its_own_message(world, tmp_path, capsys, monkeypatch):
    real = tokens.Stream.rows

    def broken(stream, step, *rest):
        if step == 2:
            raise OSError("train_000.bin: the disk is gone")
        return real(stream, step, *rest)

    monkeypatch.setattr(tokens.Stream, "rows", broken)
    words = dict(data=world.data, out=tmp_path, tokens=4 * 1024)
    assert "the disk is gone" in refused(capsys, "pretrain", *PRETRAIN, **words)
    made = [loss for _, loss in metrics(tmp_path / "step4.pt", "loss") if loss is not None]
    assert len(made) == 2, "the steps before it were made"


def test_text_is_pinned_for_a_gpu(world, monkeypatch):
    """Made in the thread that reads ahead, in memory that a GPU reads on its own."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x.shape) or x)
    cfg = SimpleNamespace(micro=4, doc_mask=True)
    stream = tokens.Stream(world.data, "train", 64, 0)
    for device, count in (("cpu", 0), ("cuda:0", 8)):
        ranks = ALONE._replace(device=torch.device(device))
        encoding = tokens.encoding("toy")
        ((first, second),) = pretrain.batches_of(stream, cfg, 8, ranks, encoding, 0, 1)
        assert len(pinned) == count and len(first) == len(second) == 4
        assert pytest.approx(first[0].numpy()) == stream.rows(0, 8)[:4]

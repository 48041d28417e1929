"""What makes a step fast changes nothing but its speed: no waits, text read ahead, document masks, checkpointed activations, profiles."""

import collections
import json
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import PRETRAIN, call, metrics, refused, small_model
from torch.utils._python_dispatch import TorchDispatchMode

import pretrain
import rl
from data import checkpoint, problems, profiler, ranks, tokens
from model import Model, ModelConfig, attend

END = 36  # the id that ends a document of small_model
ALONE = ranks.World(0, 1, torch.device("cpu"), torch.float32)


# ---------------------------------------------------------------------------------------------------------- host syncs


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a GPU: a number taken out of a tensor, by item, float, int, bool or tolist."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count, self.tolist = collections.Counter(), torch.Tensor.tolist
        monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: self.count.update(["tolist"]) or self.tolist(tensor))

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten._local_scalar_dense.default:
            self.count.update(["number"])
        return op(*args, **(kwargs or {}))


def test_a_step_waits_for_nothing_before_its_decision(world, tmp_path, monkeypatch):
    """Two reads a step, the norm and the loss, with 1 part or 8. Seen to fail with float(part.detach()) in the loop."""
    def reads(steps, micro):
        with Reads(monkeypatch) as mode:
            call("pretrain", *PRETRAIN, data=world.data, out=tmp_path, tokens=steps * 1024, micro=micro, eval_every=0,
                 verify="false", overwrite="true")  # fmt: skip
        monkeypatch.undo()
        return mode.count

    for micro in (16, 2):
        assert reads(5, micro) - reads(3, micro) == {"number": 2, "tolist": 2}, micro


def test_rl_reads_its_sums_once(monkeypatch):
    """Seen to fail with the five sums of a piece read where they are made."""
    torch.manual_seed(0)
    rows = [[1, 2, 3, 4]] * 8
    batch = problems.make_batch(rows, rows, [0.1, -0.1] * 4, 0, [[-1.0] * 4] * 8)
    model, cfg, counts = small_model(dtype=torch.float32), SimpleNamespace(micro=0, temperature=1.0), []
    for cfg.micro in (8, 1):
        pieces = list(problems.micro_batches(batch, cfg.micro, ALONE))
        monkeypatch.setattr(problems, "micro_batches", lambda *_, pieces=pieces, **__: pieces)
        with Reads(monkeypatch) as mode:
            loss, told = rl.rl_backward(model, batch, cfg, ALONE)
        monkeypatch.undo()
        counts.append(mode.count)
    assert counts[0] == counts[1] == {"tolist": 1, "number": 1} and told["mismatch_max"] > told["mismatch"] > 0 and torch.is_tensor(loss)


# ------------------------------------------------------------------------------------------------------ text read ahead


def test_text_comes_in_order_and_one_step_ahead(world):
    stream, made, second = tokens.Stream(world.data, "train", 64, 0), [], threading.Event()

    def make(step):
        made.append((step, threading.current_thread() is threading.main_thread()))
        if step == 4:
            second.set()
        return stream.rows(step, 8)

    batches = tokens.ahead(make, 3, 7)
    first = next(batches)
    assert second.wait(10) and made == [(3, False), (4, False)]  # the next is made while this one is in use, and no more
    for step, rows in enumerate([first, *batches], 3):
        assert np.array_equal(rows, stream.rows(step, 8))
    assert [step for step, _ in made] == [3, 4, 5, 6] and list(tokens.ahead(make, 5, 5)) == []


def test_an_error_while_reading_ahead_has_its_own_message(world, tmp_path, capsys, monkeypatch):
    rows = tokens.Stream.rows

    def broken(stream, step, *rest):
        if step == 2:
            raise OSError("train_000.bin: the disk is gone")
        return rows(stream, step, *rest)

    monkeypatch.setattr(tokens.Stream, "rows", broken)
    assert "the disk is gone" in refused(capsys, "pretrain", *PRETRAIN, data=world.data, out=tmp_path, tokens=4 * 1024)
    assert len([x for x in metrics(tmp_path / "step4.pt", "loss") if x[1] is not None]) == 2  # the steps before it were made


# ------------------------------------------------------------------------------------------------------- document masks


def packed():
    """Two rows of 24 inputs and a target, and their documents as (row, first, end), an end token last."""
    ids = torch.randint(END, (2, 25), generator=torch.Generator().manual_seed(0))
    ids[0, [6, 7, 15]], ids[1, 23] = END, END  # a document of one token, one that goes on after the row, one that fills it
    return ids, [(0, 0, 7), (0, 7, 8), (0, 8, 16), (0, 16, 24), (1, 0, 24)]


def test_the_end_token_belongs_to_the_document_it_ends():
    """Seen to fail without the shift by one."""
    ids, documents = packed()
    starts = tokens.document_starts(ids.numpy(), END)
    assert starts.tolist() == [24 * row + first for row, first, _ in documents] + [48] and starts.dtype == np.int32
    assert tokens.encode_document(tokens.encoding("toy"), " the")[-1] == tokens.encoding("toy").eot_token


def test_a_document_in_a_packed_row_is_as_if_alone():
    """Log-probs and gradients in fp64. Seen to fail with positions that go on from document to document, since cos and sin are
    fp32; with a mask that is not causal; without a mask."""
    model, (ids, documents) = small_model(), packed()
    weight = torch.rand(2, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    starts = torch.from_numpy(tokens.document_starts(ids.numpy(), END))
    loss, logp, _ = model(ids, weight=weight, starts=starts)
    loss.backward()
    together = [p.grad.clone() for p in model.parameters()]
    assert (model(ids)[0] - logp).abs().max() > 0.1
    model.zero_grad()
    for row, first, end in documents:  # the token after it is a target of its last one
        part, alone, _ = model(ids[row : row + 1, first : end + 1], weight=weight[row : row + 1, first:end])
        part.backward()
        torch.testing.assert_close(logp[row, first:end], alone[0], atol=1e-10, rtol=0)
    for p, gradient in zip(model.parameters(), together, strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=1e-10, rtol=1e-10)


def test_without_doc_mask_the_attention_is_what_it_was(monkeypatch):
    calls, real = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(k) or real(*a, **k))
    model, ids = small_model(), packed()[0]
    plain = model(ids)[0]
    assert calls == [dict(attn_mask=None, is_causal=True)] * 2
    torch.testing.assert_close(model(ids, starts=torch.tensor([0, 24, 48], dtype=torch.int32))[0], plain, atol=1e-12, rtol=0)


def test_the_flash_kernel_is_given_the_same_documents(monkeypatch):
    """The CUDA path up to the kernel, which is replaced by attention over each document: its layout, its ends, its causal
    window. Seen to fail with the heads before the tokens, and with window (-1, -1)."""
    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size):
        assert cu_q.dtype == torch.int32 and cu_k is cu_q and max_q == max_k >= int(cu_q.diff().max())
        out = []
        for a, b in zip(cu_q.tolist(), cu_q.tolist()[1:], strict=False):
            parts = (y[a:b].transpose(0, 1) for y in (q, k, v))  # (H, T, K)
            out.append(torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=window_size == (-1, 0)).transpose(0, 1))
        return torch.cat(out)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    ids, documents = packed()
    starts = torch.from_numpy(tokens.document_starts(ids.numpy(), END))
    q, k, v = torch.randn(3, 2, 4, 24, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = torch.zeros(2, 1, 24, 24, dtype=torch.bool)
    for row, first, end in documents:
        seen[row, 0, first:end, first:end] = torch.ones(end - first, end - first, dtype=torch.bool).tril()
    torch.testing.assert_close(attend(q, k, v, starts), attend(q, k, v, seen), atol=1e-12, rtol=0)


def test_doc_mask_in_training_and_in_the_held_out_loss(world, tmp_path):
    """The held-out loss of a --doc_mask run is that of each document alone."""
    for name in ("true", "false"):
        call("pretrain", *PRETRAIN, data=world.data, out=tmp_path / name, tokens=2 * 1024, doc_mask=name, micro=5, dtype="float64")
    (*_, (_, masked, held_out)), (*_, (_, plain, _)) = (metrics(tmp_path / n / "step2.pt", "loss", "held_out") for n in ("true", "false"))
    assert masked != plain
    saved = checkpoint.load(tmp_path / "true" / "step2.pt")
    model = checkpoint.load_model(saved, Model, ModelConfig, ALONE._replace(compute=torch.float64)).requires_grad_(False)
    stream, total = tokens.Stream(world.data, "val", 64, 0), 0.0
    for i in range(4):
        ids = torch.from_numpy(stream.window(i))[None]
        bounds = tokens.document_starts(ids.numpy(), tokens.encoding("toy").eot_token).tolist()
        assert len(bounds) > 2
        for first, end in zip(bounds, bounds[1:], strict=False):
            total -= float(model(ids[:, first : end + 1])[0].sum())
    assert held_out == pytest.approx(total / (4 * 64), abs=1e-6)  # weights are saved in fp32


# ----------------------------------------------------------------------------------------------- checkpointed activations


def gradients(model, ids, kept=False, starts=None):
    """Gradients of all weights, and the bytes that were kept for the backward pass."""
    model.checkpoint_activations, held = kept, []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.nbytes) or x, lambda x: x):
        loss, *_ = model(ids, weight=torch.full((len(ids), ids.shape[1] - 1), 0.01), starts=starts)
    loss.backward()
    taken = [ranks.whole(p.grad).clone() for p in model.parameters()]
    model.zero_grad()
    return taken, sum(held)


@pytest.mark.parametrize("how", ["eager", "documents", "compiled", "sharded"])
def test_checkpointed_activations_change_no_gradient(how):
    """Bit for bit, with documents, with compiled blocks and with sharded ones. Seen to fail, by what is kept, with checkpoint(...)
    left out."""
    model = small_model(dtype=torch.float32, layers=4)
    ids = torch.randint(END, (4, 65), generator=torch.Generator().manual_seed(0))
    starts = torch.tensor([0, 10, 64, 128, 150, 192, 256], dtype=torch.int32) if how == "documents" else None
    if how == "compiled":
        for block in model.blocks:
            block.compile(backend="aot_eager", dynamic=False)
    if how == "sharded":
        whole = model.state_dict()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        with torch.device("meta"):
            model = Model(model.config)
        ranks.place(model, ALONE._replace(shard=True))
        with torch.no_grad():
            for name, p in model.named_parameters():
                ranks.put(p, whole[name])
    try:
        (plain, many), (again, few) = (gradients(model, ids, kept, starts) for kept in (False, True))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert all(g.any() for g in plain) and all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert few < many / 2 or how == "compiled"  # what a compiled block keeps is not seen by these hooks


# ------------------------------------------------------------------------------------------------------- MFU and profiles


def test_mfu_is_left_out_where_no_peak_is_known(world, tmp_path):
    for peak in (0, 0.25):
        call("pretrain", *PRETRAIN, data=world.data, out=tmp_path / str(peak), tokens=2 * 1024, peak_tflops=peak)
    assert all(mfu is None for _, mfu in metrics(tmp_path / "0" / "step2.pt", "mfu"))
    model = Model(ModelConfig(**checkpoint.load(tmp_path / "0.25" / "step2.pt")["config"]))
    for _, mfu, speed in metrics(tmp_path / "0.25" / "step2.pt", "mfu", "tokens_per_s"):
        assert mfu == pytest.approx(model.flops_per_token(64) * speed / 0.25e12)


@pytest.mark.parametrize("name, peak", [("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756),
                                        ("NVIDIA H200 NVL", 835), ("NVIDIA A100-SXM4-80GB", 312), ("Tesla T4", 0)])  # fmt: skip
def test_peak_by_the_name_of_the_gpu(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    world = ranks.World(0, 8, torch.device("cuda:0"), torch.bfloat16)
    assert pretrain.peak_flops(SimpleNamespace(peak_tflops=0.0), world) == 8e12 * peak
    assert pretrain.peak_flops(SimpleNamespace(peak_tflops=100.0), world) == 8e14


@pytest.mark.parametrize("stage", ["pretrain", "mix"])  # mix does what sft and rl do
def test_profile_accounts_for_a_step(world, tmp_path, capsys, stage):
    if stage == "pretrain":
        out, words = tmp_path / "p", dict(data=world.data, tokens=8 * 1024, micro=8)
        call(stage, *PRETRAIN, out=out, profile=2, **words)
    else:
        out = tmp_path / "mix.pt"
        call(stage, init=world.taught, out=out, profile=2, steps=8, questions_per_step=4, group=4, batch=8, max_new=24,
             eval_questions=0, compile="false")  # fmt: skip
    trace, said = json.loads(Path(f"{out}.trace.json").read_text()), capsys.readouterr().out
    names = ["data", "forward", "loss head", "backward", "reduce", "optimizer", "the rest"]
    names[1:1] = ["sampling", "reward"] if stage == "mix" else []
    assert list(trace["shares"]) == names and sum(trace["shares"].values()) == pytest.approx(1)
    assert all(share > 0 for share in trace["shares"].values()) and all(f"  {name}" in said for name in names)
    spans = [(e["name"], e["ts"], e["ts"] + e["dur"]) for e in trace["traceEvents"] if e.get("cat") == "user_annotation"]
    assert sum(name.startswith("ProfilerStep") for name, *_ in spans) == 2
    spans = sorted((begin, end) for name, begin, end in spans if name in profiler.RANGES)
    assert all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:], strict=False))  # none inside another


def test_shares_of_a_gpu_are_by_what_launched():
    """A kernel of the backward pass runs late and is launched by another thread; one belongs to no range. 100 us in all."""
    def event(cat, name, ts, dur, thread, correlation=0):
        return dict(ph="X", cat=cat, name=name, ts=ts, dur=dur, tid=thread, args=dict(correlation=correlation))

    events = [event("user_annotation", "ProfilerStep#6", 0, 100, 1), event("user_annotation", "forward", 0, 10, 1),
              event("user_annotation", "backward", 20, 10, 1), event("user_annotation", "Optimizer.step#Adam.step", 40, 5, 1),
              event("cuda_runtime", "cudaLaunchKernel", 5, 1, 1, 7), event("cuda_runtime", "cudaLaunchKernel", 25, 1, 2, 8),
              event("cuda_driver", "cuLaunchKernelEx", 15, 1, 1, 9), event("kernel", "gemm", 10, 30, 3, 7),
              event("kernel", "gemm", 45, 40, 3, 8), event("gpu_memcpy", "copy", 41, 2, 3, 9)]  # fmt: skip
    shares, seconds = profiler.shares(events)
    assert shares == pytest.approx({"forward": 0.3, "backward": 0.4, "the rest": 0.3}) and seconds == pytest.approx(1e-4)

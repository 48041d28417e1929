"""What bf16 does to a step at the widths of the 1B model, on a CPU; and that fp64 stays fp64.

Two layers of width 2048 with random weights; everything but the vocabulary is as wide as in the
1B. The figures are printed with `pytest -s`.
"""

import pytest
import torch

import common
from helpers import call, flags, same_weights, weights
from model import Model, ModelConfig, Sampler, adam, update

SHAPE = dict(layers=2, width=2048, heads=16, ffn=8192, context=128)
VOCAB = 8192
PROMPT, NEW, ROWS = 12, 20, 8


@pytest.fixture(scope="module")
def wide():
    """The model in fp32."""
    generator = torch.Generator().manual_seed(0)
    model = Model(ModelConfig(**SHAPE, vocab=VOCAB, padded_vocab=8320))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:  # the std of Model.init_weights, which takes longer
                p.normal_(0, 0.02, generator=generator)
    return model


@pytest.fixture(scope="module")
def half(wide):
    """The same fp32 weights, computed with in bf16."""
    with torch.device("meta"):
        model = Model(wide.config, torch.bfloat16)
    model.load_state_dict(wide.state_dict(), assign=True)
    return model.requires_grad_()


@pytest.fixture(scope="module")
def answers(half):
    """Ids (ROWS, PROMPT + NEW) of sampled answers, and their log-probs under the sampler."""
    return sample(half)


def sample(model):
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(VOCAB, (2, PROMPT), generator=generator)
    samples = Sampler(model)(prompts.tolist(), ROWS // 2, NEW, list(range(ROWS)), [VOCAB])
    return torch.cat([prompts.repeat_interleave(ROWS // 2, 0), samples.tokens], 1), samples.logp


def answer_mask():
    mask = torch.zeros(ROWS, PROMPT + NEW - 1, dtype=torch.bool)
    mask[:, PROMPT - 1 :] = True
    return mask


def gap_to_trainer(model, ids, sampled):
    """|log-prob| between sampler and trainer, of each sampled token; mean entropy in nats."""
    with torch.no_grad():
        logp, entropy = model(ids[:, :-1], ids[:, 1:], mask=answer_mask())
    return (logp[:, PROMPT - 1 :] - sampled).abs(), float(entropy[:, PROMPT - 1 :].mean())


def test_the_trainer_sees_what_the_sampler_samples_from(half, answers):
    gap, entropy = gap_to_trainer(half, *answers)
    print(f"\n|log-prob| at {entropy:.1f} nats: mean {gap.mean():.4f}, largest {gap.max():.3f}")
    assert gap.mean() < 0.01


def test_a_sure_model_does_not_trip_max_mismatch(half):
    """Rounding is relative, so logits eight times as large differ by more: rl.py must not stop."""
    with torch.no_grad():
        half.head.weight.mul_(8)
        gap, entropy = gap_to_trainer(half, *sample(half))
        half.head.weight.div_(8)
    print(f"\n|log-prob| at {entropy:.1f} nats: mean {gap.mean():.4f}, largest {gap.max():.3f}")
    assert entropy < 2 and gap.mean() < 0.05  # --max_mismatch is 0.1


def gradients(model, ids, use) -> list[torch.Tensor]:
    """Of a policy gradient: with its weights in the loss, or through differentiable log-probs."""
    generator = torch.Generator().manual_seed(2)
    mask = answer_mask()
    weight = torch.randn(mask.shape, generator=generator) / mask.sum() * mask
    model.zero_grad()
    if use == "weighted":
        loss, *_ = model(ids[:, :-1], ids[:, 1:], weight=weight, mask=mask)
    else:
        logp, _ = model(ids[:, :-1], ids[:, 1:], mask=mask)
        loss = -(weight * logp).sum()
    loss.backward()
    taken = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return taken


@pytest.fixture(scope="module")
def exact(wide, answers):
    """The gradients in fp32, which both uses of the loss head have."""
    return gradients(wide, answers[0], "weighted")


@pytest.mark.parametrize("use", ["weighted", "differentiable"])
def test_gradients_are_those_of_fp32(half, answers, exact, use):
    """Both uses of the loss head; the gradients of fp32 weights are in fp32."""
    found = gradients(half, answers[0], use)
    assert all(g.dtype == torch.float32 for g in found)
    errors = [float((a - b).norm() / a.norm()) for a, b in zip(exact, found, strict=True)]
    cosines = []
    for a, b in zip(exact, found, strict=True):
        cosines.append(float(torch.sum(a * b, dtype=torch.float64) / a.norm() / b.norm()))
    print(f"\n{use}: largest relative error {max(errors):.4f}, smallest cosine {min(cosines):.5f}")
    assert max(errors) < 0.05 and min(cosines) > 0.998


def test_an_update_of_a_millionth_changes_weights(half, exact):
    """fp32 masters take what bf16 weights would round away."""
    before = [p.detach().clone() for p in half.parameters()]
    update(half, [(adam(half), 1e-6, exact)], 0.0)
    with torch.no_grad():
        for p, old, g in zip(half.parameters(), before, exact, strict=True):
            moved = p - old
            reached = g != 0  # not ids that do not occur, nor the padding of the head
            assert (moved[reached] != 0).float().mean() > 0.99
            assert float(moved.abs().max()) < 1.1e-6
            if p.dim() > 1:
                same = p.bfloat16() == old.bfloat16()
                assert same.float().mean() > 0.9, "in bf16 most weights would stay"
            p.copy_(old)


def test_fp64_weights_are_resumed_in_fp64(world, tmp_path, monkeypatch):
    """Not through fp32."""
    how = dict(init=world.taught, dtype="float64", batch=8, steps=4, save_every=1, warmup=1)
    words = flags(eval_questions=0, **how)
    call("sft", *words, out=tmp_path / "whole.pt")
    real = common.save_state

    def stop(*args):
        real(*args)
        if args[-1] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(common, "save_state", stop)
        call("sft", *words, out=tmp_path / "stopped.pt")
    call("sft", *words, "--resume", out=tmp_path / "stopped.pt")
    assert same_weights(tmp_path / "whole.pt", tmp_path / "stopped.pt")
    assert {x.dtype for x in weights(tmp_path / "stopped.pt").values()} == {torch.float64}

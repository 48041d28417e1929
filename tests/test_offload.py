"""--offload: the same bits as without, and what it leaves on the GPU."""

import shutil

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import common
import plan
from helpers import call, complaint, files, refused
from model import PRESETS, Model, ModelConfig, adam, update
from runs import STAGES, goes_on, words_of
from test_memory import no_memory
from test_plan import Held, fitted
from test_resume import stopped


@pytest.mark.parametrize("stage", STAGES)
def test_the_same_bits_and_the_same_record(whole, world, tmp_path, stage):
    out = tmp_path / "run/step6.pt"
    goes_on(stage, whole, world, out, words_of(stage, world, out, offload="true"))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("first, then", [("true", "false"), ("false", "true")])
def test_a_run_resumes_with_the_other_setting(whole, world, tmp_path, stage, first, then):
    out = tmp_path / "run/step6.pt"
    stopped(stage, words_of(stage, world, out, offload=first))
    goes_on(stage, whole, world, out, words_of(stage, world, out, offload=then))


def test_a_saved_state_is_the_same_file(world, tmp_path):
    saved = []
    for offload in ("true", "false"):
        out = tmp_path / "step6.pt"
        stopped("sft", words_of("sft", world, out, offload=offload))
        state = common.load(f"{out}.resume")
        moments = [x for kept in state["optimizers"][0]["state"].values() for x in kept.values()]
        saved.append([x.clone() for x in moments])
        assert len(saved[-1]) == 3 * len(state["model"])
        shutil.rmtree(tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(*saved, strict=True))


# ---- memory


class OnGpu(Held):
    """Of the tensors that a GPU would hold."""

    def add(self, *tensors):
        super().add(*(x for x in tensors if x.device.type == "cuda"))


@pytest.mark.parametrize("optimizers", [1, 2])
def test_the_gpu_holds_no_moments_but_those_of_one_parameter(monkeypatch, optimizers):
    """Of the whole 1b, as fake tensors of a GPU that need not be there.

    What `resume` gives an optimizer, and three updates.
    """
    with torch.device("meta"):
        model = Model(ModelConfig(**PRESETS["1b"]), torch.bfloat16)
    largest = model.head.weight.numel()
    # a torch without CUDA has no copy_ into such a tensor
    monkeypatch.setattr(common, "put", lambda mine, source: source.to(mine.device))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cuda")
        adams = [adam(model, offload=True) for _ in range(optimizers)]
        parameters = list(model.parameters())
        with OnGpu() as held:
            held.add(*parameters)
            moments = dict(exp_avg=torch.zeros, exp_avg_sq=torch.zeros)
            state = {
                i: {name: make(p.shape) for name, make in moments.items()}
                | {"step": torch.tensor(1.0)}
                for i, p in enumerate(parameters)
            }
            common.resume(dict(optimizers=[{"state": state}] * optimizers, model=0, step=1), *adams)
            for _ in range(3):
                steps = [(opt, 1e-3, [torch.ones_like(p) for p in parameters]) for opt in adams]
                update(model, steps, 0.1)
                del steps
            left = held.bytes()
    for optimizer in adams:
        kept = [x for state in optimizer.state.values() for x in state.values()]
        assert len(kept) == 3 * len(parameters) and {x.device.type for x in kept} == {"cpu"}
    expected = plan.memory(plan.shape("1b"), optimizers, offload=True)
    assert left == pytest.approx(expected.holds["weights"], rel=1e-3)
    whole = sum(expected.holds.values()) + expected.summed
    assert expected.summed == 8 * largest and expected.holds["moments"] == 0
    assert held.most == pytest.approx(whole, rel=0.01)


def test_rl_of_the_1b_fits_24_gb_with_it_and_not_without(monkeypatch):
    chosen, needed, room = fitted("rl", "1b", 24, 1, monkeypatch, offload=True)
    assert chosen["micro"] >= 1 and needed <= room
    assert fitted("rl", "1b", 24, 1, monkeypatch, offload=False)[0] is None
    chosen, needed, room = fitted("rl", "1b", 24, 1, monkeypatch)
    assert chosen["offload"] and needed <= room  # nobody said, and nothing else fits


def test_it_is_chosen_only_where_nothing_else_fits(monkeypatch):
    assert "offload" not in fitted("rl", "1b", 80, 1, monkeypatch)[0]
    chosen, _, _ = fitted("rl", "4b", 80, 8, monkeypatch)
    assert chosen["shard"] and "offload" not in chosen
    assert "shard" not in fitted("rl", "1b", 40, 8, monkeypatch, offload=True)[0]


def test_the_plan_shows_where_the_moments_are(capsys):
    call("rl", "--plan", "1b", "--offload")
    told = capsys.readouterr().out
    assert "13.4 in the CPU's memory" in told and "moments" not in told


# ---- what does not go together


@pytest.mark.parametrize("stage", STAGES)
def test_offload_and_shard_are_refused(world, tmp_path, capsys, stage):
    words = words_of(stage, world, tmp_path / "a.pt")
    said = refused(capsys, stage, *words, "--offload", "--shard")
    assert "--offload" in said and "--shard" in said
    assert "--shard" in complaint(capsys, lambda: call(stage, "--plan=1b", "--offload", "--shard"))
    assert not files(tmp_path)


def test_out_of_memory_names_it_until_it_is_given(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pretrain.update", no_memory)
    words = words_of("pretrain", world, tmp_path / "a.pt")
    said = refused(capsys, "pretrain", *words)
    assert "--offload" in said and "--shard" in said
    said = refused(capsys, "pretrain", *words, "--offload")
    assert "--offload" not in said and "--shard" not in said


def test_the_optimizer_alone(world):
    """Against Adam itself, on a model whose rate and gradients change from step to step."""
    models = [common.load_model(common.load(world.base), common.start("cpu")) for _ in range(2)]
    adams = [adam(models[0]), adam(models[1], offload=True)]
    generator = torch.Generator().manual_seed(0)
    for rate in (1e-2, 3e-3, 1e-3):
        gradients = [torch.randn(p.shape, generator=generator) for p in models[0].parameters()]
        for model, optimizer in zip(models, adams, strict=True):
            update(model, [(optimizer, rate, [g.clone() for g in gradients])], 0.1)
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert all(p.grad is None for p in models[1].parameters())

"""Memory that does not suffice: one line with flags that take less, at their present values."""

import importlib

import pytest
import torch

import model as network
from helpers import refused
from runs import words_of


def no_memory(*_, **__):
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 139.81 GiB"
    )


def no_cpu_memory(*_, **__):
    torch.empty(1 << 55)


def in_backward(monkeypatch):
    real = network.Model.forward

    def forward(*arguments, **more):
        loss, *rest = real(*arguments, **more)
        loss.register_hook(no_memory)
        return loss, *rest

    monkeypatch.setattr(network.Model, "forward", forward)


def at(place, monkeypatch):
    owner, name = place.split(".")
    owner = getattr(network, owner, None) or importlib.import_module(owner)
    monkeypatch.setattr(owner, name, no_memory)


@pytest.mark.parametrize(
    "stage, place, changes, named",
    [
        ("pretrain", "Model.hidden", dict(micro=6), ["--micro (now 6)"]),
        ("pretrain", "pretrain.update", {}, ["--micro", "--checkpoint_activations", "--shard"]),
        ("sft", "backward", {}, ["--micro", "--checkpoint_activations"]),
        ("rl", "Sampler.prefill", dict(rows=8), ["--rows (now 8)", "--max_new (now 32)"]),
        ("rl", "Sampler._draw", {}, ["--rows"]),
        ("mix", "Model.hidden", {}, ["--micro", "--rows"]),
    ],
)
def test_out_of_memory(world, tmp_path, monkeypatch, capsys, stage, place, changes, named):
    """Only flags that the script has."""
    in_backward(monkeypatch) if place == "backward" else at(place, monkeypatch)
    more = {} if stage == "pretrain" else dict(eval_questions=0)
    message = refused(capsys, stage, *words_of(stage, world, tmp_path / "a.pt", **more | changes))
    assert "2.50 GiB" in message and all(flag in message for flag in named)
    assert stage != "pretrain" or "--rows" not in message
    assert not list(tmp_path.glob("*.pt"))


def test_out_of_memory_on_the_cpu(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(network.Model, "hidden", no_cpu_memory)
    message = refused(capsys, "sft", *words_of("sft", world, tmp_path / "a.pt", eval_questions=0))
    assert message.startswith("out of memory") and "--micro" in message
    assert "--offload" not in message and "GPU" not in message

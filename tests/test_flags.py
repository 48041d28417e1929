"""Flags: unknown ones, wrong types, numbers outside their range, and --help."""

import dataclasses
import importlib
import os
import sys
import typing

import pytest

import common
from helpers import call, refused

SCRIPTS = ("pretrain", "sft", "rl", "mix", "eval", "sample")


def config_of(script):
    return importlib.import_module(script).Config


def numbers_of(Config) -> dict:
    """{field: (int or float, its range)} of all fields that hold a number, or a tuple of them."""
    found = {}
    for name, hint in typing.get_type_hints(Config, include_extras=True).items():
        legal = None
        while typing.get_args(hint) and typing.get_origin(hint) is not typing.Literal:
            if typing.get_origin(hint) is typing.Annotated:
                legal = typing.get_args(hint)[1]
            hint = typing.get_args(hint)[0]  # of X | None, tuple[X, ...], Annotated[X, range]
        if hint in (int, float):
            found[name] = hint, legal
    return found


NUMBERS = [(script, *item) for script in SCRIPTS for item in numbers_of(config_of(script)).items()]


@pytest.mark.parametrize("script, name, kind", NUMBERS, ids=lambda x: x if type(x) is str else "")
def test_number_outside_its_range(script, name, kind):
    """--clip -1 trained uphill, in silence: every number has a range, and is refused outside it."""
    kind, legal = kind
    assert legal is not None, f"--{name} of {script}.py has no range"
    wrong = [legal.least - 1, "nan", "inf", "x", ""]
    wrong += [] if legal.most == float("inf") else [legal.most + 1]
    wrong += [legal.least] if legal.above else []
    wrong += ["1.5"] if kind is int else []
    for value in wrong:
        with pytest.raises(ValueError) as error:
            common.parse_flags(config_of(script), [f"--{name}={value}", "--init=x"])
        assert f"--{name}" in str(error.value)


@pytest.mark.parametrize("script", SCRIPTS)
def test_defaults_lie_in_their_ranges(script):
    """Those of the laptop and those of the paper's sizes."""
    module = importlib.import_module(script)
    ranges = numbers_of(module.Config)
    values = {field.name: field.default for field in dataclasses.fields(module.Config)}
    for defaults in (values, getattr(module, "PAPER", {})):
        assert defaults.keys() <= values.keys()
        for name in defaults.keys() & ranges.keys():
            value = defaults[name]
            if value is not None:
                value = value if isinstance(value, tuple) else (value,)
                assert all(x in ranges[name][1] for x in value), name


@pytest.mark.parametrize(
    "script, words, named",
    [
        ("sft", ["--clip", "-1"], "--clip"),
        ("sft", ["--lr", "-1e-3"], "--lr"),
        ("pretrain", ["--lr=0"], "--lr"),
        ("rl", ["--group", "0"], "--group"),
        ("rl", ["--group", "1"], "--group"),
        ("rl", ["--clip_ratio", "0.1"], "--clip_ratio"),
        ("rl", ["--temperature", "0"], "--temperature"),
        ("mix", ["--temperature", "0"], "--temperature"),
        ("mix", ["--share", "1.5"], "--share"),
        ("mix", ["--share_end", "-0.1"], "--share_end"),
        ("pretrain", ["--save_steps", "0"], "--save_steps"),
        ("eval", ["--k", ""], "--k"),
        ("eval", ["--k", "0"], "--k"),
        ("eval", ["--n", "4"], "--n"),
        ("sft", ["--solutions", "0"], "--solutions"),
        ("sft", ["--solutions", "gold"], "--solutions"),
        ("mix", ["--solutions", "-1"], "--solutions"),
    ],
)
def test_value_that_makes_no_sense(world, tmp_path, capsys, script, words, named):
    """What would train uphill, on nothing, or on groups that are all flat; nothing is written."""
    where = dict(init=world.base, out=tmp_path / "a.pt")
    if script == "eval":
        words = [world.base, *words]
        where = dict(results=tmp_path / "results")
    if script == "pretrain":
        where = dict(data=world.data, out=tmp_path / "ckpt")
    assert named in refused(capsys, script, *words, **where)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words, named",
    [
        (["--lrr", "1"], ["--lrr", "--lr?"]),
        (["--query_per_step", "4"], ["--query_per_step", "--questions_per_step?"]),
        (["--zzz"], ["--zzz", "--help"]),
        (["ckpt/a.pt"], ["ckpt/a.pt"]),
        (["--steps", "many"], ["--steps", "'many'"]),
        (["--std_norm", "maybe"], ["--std_norm", "true or false", "'maybe'"]),
        (["--steps"], ["--steps"]),
        (["--init", "a.pt", "--out", "--resume"], ["--out needs a value"]),
        ([], ["--init"]),
        (["--init", "x.pt", "--dtype", "int8"], ["--dtype", "bfloat16", "'int8'"]),
        (["--init", "x.pt", "--device", "tpu"], ["x.pt"]),
    ],
)
def test_wrong_flag_is_named(capsys, words, named):
    message = refused(capsys, "rl", *words)
    assert all(name in message for name in named)


def test_flags_are_read():
    words = "--tokens 2.8M --save_tokens 1k,2000,3e3,4.1M --lr=1e-3 --resume --compile false"
    given = common.parse_flags(config_of("pretrain"), words.split())
    assert given == {
        "tokens": 2_800_000,
        "save_tokens": (1000, 2000, 3000, 4_100_000),
        "lr": 1e-3,
        "resume": True,
        "compile": False,
    }
    given = common.parse_flags(config_of("eval"), ["a.pt", "b.pt", "--final", "--k", "1,4"])
    assert given == {"checkpoints": ("a.pt", "b.pt"), "final": True, "k": (1, 4)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_each_flag_with_its_reason_and_default(capsys, script):
    with pytest.raises(SystemExit) as stop:
        call(script, "--help")
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    module = importlib.import_module(script)
    ranges = numbers_of(module.Config)
    paper = getattr(module, "PAPER", {})
    for field in dataclasses.fields(module.Config):
        (line,) = [line for line in shown.splitlines() if line.startswith(f"  --{field.name} ")]
        reason, _, values = line.removeprefix(f"  --{field.name} ").partition(" [")
        assert len(reason.strip()) > 5, f"no reason beside --{field.name}"
        told = values.removesuffix("]").split("; ")
        if field.default not in (dataclasses.MISSING, "", (), None):
            assert told[0] == str(field.default)
        if field.name in paper:
            assert told[1].endswith(f" {paper[field.name]}")
        if field.name in ranges:
            assert told[-1] == str(ranges[field.name][1])


def test_help_into_a_pipe_that_is_closed(monkeypatch, capsys):
    """`sample.py --help | head -3`: nothing is said, neither here nor at Python's last flush."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as stop:
            call("sample", "--help")
        pipe.flush()
    assert stop.value.code == 0 and not capsys.readouterr().err


@dataclasses.dataclass(kw_only=True)
class Parent:
    """Flags of all."""

    one: common.Count = 1  # beside
    # above
    two: common.Count = 2


@dataclasses.dataclass(kw_only=True)
class Child(Parent):
    two: common.Count = 3
    three: str = ""  # its own


def test_another_default_keeps_the_inherited_reason(capsys):
    common.print_help(Child, "")
    shown = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    shown = dict(words for words in shown if len(words) == 2 and words[0].startswith("--"))
    expected = {"--two": "above [3; from 1]", "--three": "its own", "--one": "beside [1; from 1]"}
    assert shown == expected


@dataclasses.dataclass(kw_only=True)
class Wrapped:
    many: tuple[common.Count, ...] = (1, 2)  # of a tuple
    maybe: common.Fraction | None = None  # of an option
    choice: typing.Literal["stop", "skip"] = "stop"  # of a few words


def test_help_shows_legal_values_inside_other_types(capsys):
    common.print_help(Wrapped, "")
    shown = capsys.readouterr().out
    assert "of a tuple [(1, 2); from 1]\n" in shown
    assert "of an option [from 0 to 1]\n" in shown
    assert "of a few words [stop; stop or skip]\n" in shown

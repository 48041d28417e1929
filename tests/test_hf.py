"""Checkpoints in Hugging Face form, both ways, against transformers and the files it writes."""

import dataclasses
import functools
import gzip
import json
import math
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
from data import hf, tokens
from data.files import read_rows, write_rows
from helpers import DATASETS, call, complaint, same_weights, small_model
from model import PRESETS, ModelConfig
from twin import transformers_twin

TOY = tokens.VOCABULARY["toy"]
IDS = torch.randint(0, TOY, (3, 40), generator=torch.Generator().manual_seed(0))
NAMED = "stage1-step10000-tokens21B"
PUBLIC = {  # config.json of allenai/OLMo-2-0425-1B, as transformers 4.51.3 wrote it
    "architectures": ["Olmo2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "eos_token_id": 100257,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "model_type": "olmo2",
    "num_attention_heads": 16,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "pad_token_id": 100277,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.51.3",
    "use_cache": True,
    "vocab_size": 100352,
}


def convert(*words):
    """`python data/hf.py words` in this process."""
    hf.main([str(word) for word in words])


@pytest.fixture
def refused(capsys):
    """refused(*words): `convert`, which must fail with exit status 2 and one line; -> that line."""
    return lambda *words: complaint(capsys, lambda: convert(*words))


@pytest.fixture(scope="module")
def twin():
    """transformers' model with random weights, the toy's vocabulary and no round numbers."""
    shape = dict(layers=3, width=24, heads=2, ffn=40, theta=10000.0, eps=1e-5)
    return transformers_twin(small_model(TOY, hf.padded(TOY), torch.float32, **shape)).eval()


@pytest.fixture
def theirs(twin, tmp_path):
    """The same on disk, in fp32 and several files, without a tokenizer."""
    twin.save_pretrained(tmp_path / NAMED, max_shard_size="20KB")
    return tmp_path / NAMED


def our_logits(path, ids):
    """(B, T, padded_vocab) of a checkpoint, in fp32 on the CPU."""
    model = common.load_model(common.load(path), common.start("cpu", "float32"))
    with torch.no_grad():
        return model.head(model.hidden(ids))


def their_logits(folder, ids):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits


def files(folder) -> dict[str, torch.Tensor]:
    parts = [load_file(path) for path in Path(folder).glob("*.safetensors")]
    assert sum(map(len, parts)) == len({name for part in parts for name in part})
    return {name: tensor for part in parts for name, tensor in part.items()}


def same_bits(one: dict, other: dict) -> bool:
    """The same names, dtypes and bits: 0.0 is not -0.0."""
    integers = {torch.float32: torch.int32, torch.bfloat16: torch.int16}

    def bits(tensors):
        return {name: (x.dtype, x.view(integers[x.dtype]).tolist()) for name, x in tensors.items()}

    return bits(one) == bits(other)


def edit(path, **changes):
    """Change fields of a JSON file; ... removes one."""
    content = {**json.loads(path.read_text()), **changes}
    kept = {name: value for name, value in content.items() if value is not ...}
    path.write_text(json.dumps(kept))


def edit_weights(folder, change):
    """Change {name: tensor} of all files in place, and write them as one file."""
    content = files(folder)
    for path in folder.glob("model*"):
        path.unlink()
    change(content)
    save_file(content, folder / "model.safetensors")


# -------------------------------------------------------------------------------------- the numbers


def test_sizes_of_the_presets_have_their_names():
    for name, preset in PRESETS.items():
        assert hf.preset_of(ModelConfig(**preset)) == name
    assert hf.preset_of(ModelConfig(**PRESETS["1b"] | {"ffn": 8})) == "16x2048"


@pytest.mark.parametrize(
    "dtype, size",
    [
        (torch.float32, "1GB"),
        *((d, "20KB") for d in (torch.float32, torch.bfloat16, torch.float16)),
    ],
)
def test_imported_logits_are_those_of_transformers(twin, tmp_path, dtype, size):
    twin.to(dtype).save_pretrained(tmp_path / NAMED, max_shard_size=size)
    twin.float()
    assert (len([*(tmp_path / NAMED).glob("*.safetensors")]) > 2) == (size == "20KB")
    out = tmp_path / "ours.pt"
    convert("import", tmp_path / NAMED, out)
    assert {w.dtype for w in common.load(out)["model"].values()} == {torch.float32}
    expected = their_logits(tmp_path / NAMED, IDS)
    torch.testing.assert_close(our_logits(out, IDS), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_exported_folder_is_the_same_model_in_transformers(world, tmp_path, size):
    folder = tmp_path / "hf"
    convert("export", world.taught, folder, "--shard", size)
    assert (folder / "model.safetensors.index.json").exists() == (size == "20KB")
    largest = max(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert largest < (1e9 if size == "1GB" else 300e3)
    expected = our_logits(world.taught, IDS)
    torch.testing.assert_close(their_logits(folder, IDS), expected, rtol=0, atol=1e-4)


def test_round_trip_from_ours(world, tmp_path):
    """Bit for bit, with the numbers that a careless conversion changes."""
    saved = common.load(world.taught)
    hard = torch.tensor([-0.0, 1e-45, math.pi * 1e-38, 3.4e38])
    saved["model"]["blocks.1.gate_up.weight"][0, :4] = hard
    torch.save(saved, tmp_path / "before.pt")
    convert("export", tmp_path / "before.pt", tmp_path / "step10-tokens0B", "--shard", "100KB")
    convert("import", tmp_path / "step10-tokens0B", tmp_path / "after.pt", "--world", "toy")
    after = common.load(tmp_path / "after.pt")
    assert same_bits(saved["model"], after["model"])
    assert [*saved["model"]] == [*after["model"]]
    assert [*saved["config"].items()] == [*after["config"].items()]
    assert saved["meta"].keys() <= after["meta"].keys()
    assert after["meta"]["encoding"] == after["meta"]["preset"] == "toy"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_from_theirs(twin, tmp_path, dtype):
    twin.to(dtype).save_pretrained(tmp_path / NAMED, max_shard_size="20KB")
    twin.float()
    back = tmp_path / "back"
    convert("import", tmp_path / NAMED, tmp_path / "ours.pt")
    name = str(dtype).removeprefix("torch.")
    convert("export", tmp_path / "ours.pt", back, "--dtype", name)
    assert same_bits(files(tmp_path / NAMED), files(back))
    was = json.loads((tmp_path / NAMED / "config.json").read_text())
    now = json.loads((back / "config.json").read_text())
    for name in ("transformers_version", "eos_token_id", "pad_token_id"):
        del was[name]
    assert was.items() <= now.items()
    assert AutoModelForCausalLM.from_pretrained(back).dtype == dtype


def test_padding_has_no_probability_in_generate_and_can_be_left_out(world, tmp_path):
    """A row of the head that is no id is never trained: its logit, about 0, beats most words."""
    saved = common.load(world.taught)
    convert("export", world.taught, tmp_path / "all")
    convert("export", world.taught, tmp_path / "trimmed", "--padding", "false")
    ids = IDS[:1]
    ours = our_logits(world.taught, ids)[..., :TOY].log_softmax(-1)
    whole = their_logits(tmp_path / "all", ids).log_softmax(-1)
    trimmed = their_logits(tmp_path / "trimmed", ids).log_softmax(-1)
    assert whole.shape[-1] == hf.padded(TOY) and whole[..., TOY:].exp().sum(-1).max() > 0.01
    torch.testing.assert_close(trimmed, ours, rtol=0, atol=1e-4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "all")
    known = model.generation_config
    assert known.suppress_tokens == list(range(TOY, hf.padded(TOY)))
    assert (known.eos_token_id, known.pad_token_id) == (TOY - 2, TOY - 1)
    how = dict(do_sample=True, temperature=5.0, top_k=0, max_new_tokens=8)
    assert model.generate(ids.expand(64, -1), **how).max() < TOY
    convert("import", tmp_path / "trimmed", tmp_path / "trimmed.pt", "--tokens", "1")
    expected = saved["config"] | {"padded_vocab": TOY}
    assert common.load(tmp_path / "trimmed.pt")["config"] == expected


# ----------------------------------------------------------------------------- config.json and meta


def write_config(folder, **fields):
    folder.mkdir(exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))
    return path


def test_public_config(tmp_path):
    """In the form of transformers 4, of 5, and with the unpadded vocabulary."""
    five = PUBLIC | {
        "rope_theta": ...,
        "rope_scaling": ...,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    }
    want = PRESETS["1b"] | {"vocab": 100278, "padded_vocab": 100352, "theta": 500000.0, "eps": 1e-6}
    for fields in (PUBLIC, five):
        shape, encoding = hf.read_config(write_config(tmp_path, **fields))
        assert dataclasses.asdict(shape) == want
        assert encoding == "cl100k_base"
        sizes = [len(names) * math.prod(size) for names, size in hf.layout(shape).values()]
        assert sum(sizes) == 1_484_916_736
    others = {"vocab_size": 100278, "rope_theta": 1e4, "rms_norm_eps": 1e-5}
    shape, _ = hf.read_config(write_config(tmp_path, **PUBLIC | others))
    assert (shape.padded_vocab, shape.theta, shape.eps) == (100278, 1e4, 1e-5)


@pytest.mark.parametrize(
    "field, value, says",
    [
        ("model_type", "llama", "model_type is 'llama', only 'olmo2' is"),
        ("model_type", ..., "model_type is None"),
        (
            "num_key_value_heads",
            4,
            "num_key_value_heads is 4, only as many as num_attention_heads (16) is",
        ),
        ("head_dim", 64, "head_dim is 64"),
        ("num_attention_heads", 15, "num_key_value_heads"),
        ("hidden_size", 2052, "head_dim is None, only an even 2052 / 16"),
        ("tie_word_embeddings", True, "tie_word_embeddings is True"),
        ("attention_bias", True, "attention_bias is True"),
        ("attention_dropout", 0.1, "attention_dropout is 0.1"),
        ("hidden_act", "gelu", "hidden_act is 'gelu'"),
        ("quantization_config", {"bits": 4}, "quantization_config"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "only plain RoPE"),
        ("rope_scaling", {"rope_type": "dynamic"}, "only plain RoPE"),
        (
            "rope_parameters",
            {"rope_type": "yarn", "rope_theta": 500000, "factor": 8.0},
            "rope_parameters",
        ),
        (
            "rope_parameters",
            {"rope_type": "default", "rope_theta": 500000, "partial_rotary_factor": 0.5},
            "rope_parameters",
        ),
        (
            "rope_parameters",
            {"rope_type": "default", "rope_theta": 10000},
            "rope_theta is [500000, 10000], only one number",
        ),
        ("rope_theta", ..., "rope_theta is []"),
        ("rope_theta", "big", "rope_theta is 'big', only a number above 0"),
        ("rms_norm_eps", ..., "rms_norm_eps is None"),
        ("hidden_size", ..., "hidden_size is None, only a whole number from 1"),
        ("num_hidden_layers", 0, "num_hidden_layers is 0"),
        ("vocab_size", 50304, "vocab_size is 50304, the encodings here have"),
    ],
)
def test_another_network_is_refused(refused, tmp_path, field, value, says):
    write_config(tmp_path / NAMED, **PUBLIC | {field: value})
    said = refused("import", tmp_path / NAMED, tmp_path / "out.pt")
    assert says in said and "config.json" in said and not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("text", ["[1]", "{", ""])
def test_broken_config_is_refused(refused, tmp_path, text):
    write_config(tmp_path / NAMED).write_text(text)
    assert "config.json" in refused("import", tmp_path / NAMED, tmp_path / "out.pt")


@pytest.mark.parametrize(
    "words, step, count",
    [
        (["--revision", "stage1-step300-tokens1B"], 300, 10**9),
        (["--revision", "stage1-step0-tokens0B"], 0, 0),
        # the name is rounded up
        (["--revision", "stage1-step1000-tokens3B", "--tokens", "2097152000"], 1000, 2_097_152_000),
        (
            ["--revision", "stage2-ingredient3-step1000-tokens3B", "--tokens", "4004e9"],
            1000,
            4_004 * 10**9,
        ),
        (["--revision", "main", "--tokens", "4e12"], 0, 4 * 10**12),
        ([], 10000, 21 * 10**9),  # the folder's own name
    ],
)
def test_tokens_of_the_name(theirs, tmp_path, words, step, count):
    convert("import", theirs, tmp_path / "out.pt", *words)
    meta = common.load(tmp_path / "out.pt")["meta"]
    assert (meta["step"], meta["tokens"]) == (step, count)


@pytest.mark.parametrize("revision", ["main", "stage2-ingredient3-step1000-tokens3B"])
def test_tokens_that_the_name_does_not_say(refused, theirs, tmp_path, revision):
    message = refused("import", theirs, tmp_path / "out.pt", "--revision", revision)
    assert "--tokens" in message and revision in message


def test_meta_is_complete(world, theirs, tmp_path):
    """Every stage and eval.py read nothing that pretrain.py writes and import does not."""
    words = "--questions some/questions --tasks some/tasks --seed 3".split()
    convert("import", theirs, tmp_path / "out.pt", *words)
    meta = common.load(tmp_path / "out.pt")["meta"]
    assert common.load(world.base)["meta"].keys() <= meta.keys()
    expected = dict(
        stage="pretrain",
        recipe="base",
        parent=str(theirs),
        world="olmo-mix-1124",
        encoding="toy",
        questions="some/questions",
        tasks="some/tasks",
        pretrain_seed=3,
        seed=3,
        preset="3x24",
        torch=torch.__version__,
    )
    assert expected.items() <= meta.items() and meta["commit"]
    edit_weights(theirs, lambda content: content["model.norm.weight"].mul_(2))
    convert("import", theirs, tmp_path / "other.pt", *words)
    other = common.load(tmp_path / "other.pt")["meta"]
    # rows of the one are not taken for rows of the other
    assert common.config_hash(other) != common.config_hash(meta)


def test_hub_id(theirs, tmp_path, monkeypatch):
    """What is asked of the hub, and that no pickle of the repository would come along."""
    asked = []

    def snapshot_download(*words, **values):
        asked.append((words, values))
        return str(theirs)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    name = "allenai/OLMo-2-0425-1B"
    revision = "stage1-step20000-tokens42B"
    out = tmp_path / "ckpt" / "out.pt"
    convert("import", name, out, "--revision", revision)
    ((words, values),) = asked
    assert words == (name,) and values["revision"] == revision
    repository = [
        "README.md",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model-00001-of-00002.safetensors",
        "tokenizer.json",
        "model.safetensors.index.json",
        "model.safetensors",
        "pytorch_model.bin",
        "training_args.bin",
        "modeling.py",
    ]
    kept = filter_repo_objects(repository, allow_patterns=values["allow_patterns"])
    assert set(repository) - {*kept} == {
        "README.md",
        "generation_config.json",
        "merges.txt",
        "pytorch_model.bin",
        "training_args.bin",
        "modeling.py",
    }
    meta = common.load(out)["meta"]
    assert (meta["parent"], meta["tokens"]) == (f"{name}@{revision}", 42 * 10**9)


def test_no_hub(refused, tmp_path, monkeypatch):
    def unreachable(*words, **values):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nto the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    said = refused("import", "allenai/OLMo-2-0425-1B", tmp_path / "out.pt", "--revision", NAMED)
    assert NAMED in said and "no connection to the hub" in said


# ------------------------------------------------------------------------- weights that are refused


def rename(content, old, new):
    content[new] = content.pop(old)


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda c: c.pop("model.layers.1.mlp.up_proj.weight"),
            "model.layers.1.mlp.up_proj.weight is missing (1 such",
        ),
        (lambda c: c.pop("lm_head.weight"), "lm_head.weight is missing"),
        (
            lambda c: c.update({"model.layers.3.mlp.up_proj.weight": torch.ones(1)}),
            "model.layers.3.mlp.up_proj.weight is nothing that OLMo2",
        ),
        (
            lambda c: c.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(24)}),
            "self_attn.q_proj.bias is nothing that OLMo2 has",
        ),
        (
            lambda c: rename(
                c,
                "model.layers.0.post_feedforward_layernorm.weight",
                "model.layers.0.input_layernorm.weight",
            ),
            "input_layernorm",
        ),
        (
            lambda c: c.update({"model.layers.0.mlp.down_proj.weight": torch.ones(40, 24)}),
            "[40, 24], its config.json needs [24, 40]",
        ),
        (
            lambda c: c.update({"model.layers.0.self_attn.k_norm.weight": torch.ones(12)}),
            "[12], its config.json needs [24]",
        ),
        (
            lambda c: c.update({"model.norm.weight": torch.ones(24, dtype=torch.float64)}),
            "model.norm.weight is F64",
        ),
    ],
)
def test_wrong_tensors_are_refused(refused, theirs, tmp_path, change, says):
    edit_weights(theirs, change)
    assert says in refused("import", theirs, tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_nan_or_infinite_are_refused(refused, theirs, tmp_path, value, dtype):
    name = "model.layers.1.self_attn.k_proj.weight"

    def damage(content):
        content[name] = content[name].to(dtype)
        content[name][3, 5] = value

    edit_weights(theirs, damage)
    assert name in refused("import", theirs, tmp_path / "out.pt")
    assert [path.name for path in tmp_path.iterdir()] == [NAMED]


def test_export_to_a_dtype_that_the_weights_do_not_fit_is_refused(refused, world, tmp_path):
    """3.4e38 is infinite in bfloat16."""
    saved = common.load(world.taught)
    saved["model"]["blocks.1.gate_up.weight"][0, 0] = 3.4e38
    torch.save(saved, tmp_path / "large.pt")
    told = refused("export", tmp_path / "large.pt", tmp_path / "hf", "--dtype", "bfloat16")
    assert "gate_proj" in told and [path.name for path in tmp_path.iterdir()] == ["large.pt"]
    convert("export", tmp_path / "large.pt", tmp_path / "hf")


def test_git_lfs_pointer_is_refused_by_name(refused, theirs, tmp_path):
    """A clone without git-lfs."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    path = sorted(theirs.glob("*.safetensors"))[0]
    path.write_text(pointer)
    assert f"{path.name} is a git-lfs pointer" in refused("import", theirs, tmp_path / "out.pt")


def test_display_that_is_switched_off_changes_nothing(theirs, tmp_path, monkeypatch):
    convert("import", theirs, tmp_path / "shown.pt")
    monkeypatch.setattr(hf, "tqdm", functools.partial(hf.tqdm, disable=True))
    convert("import", theirs, tmp_path / "hidden.pt")
    assert same_weights(tmp_path / "shown.pt", tmp_path / "hidden.pt")


def test_pickles_are_refused(refused, theirs, tmp_path):
    for path in theirs.glob("model*"):
        path.unlink()
    assert "nothing to read" in refused("import", theirs, tmp_path / "out.pt")
    (theirs / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch run'\ntR.")
    assert "pickles" in refused("import", theirs, tmp_path / "out.pt")


def test_what_claims_a_terabyte_is_refused(refused, theirs, tmp_path):
    """A header of that length, a tensor of that size, a billion layers: before memory is taken."""
    path = sorted(theirs.glob("*.safetensors"))[0]
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    rest = whole[8 + size :]
    name = next(name for name in header if name != "__metadata__")
    tensor = {"dtype": "F32", "shape": [1 << 19, 1 << 19], "data_offsets": [0, 1 << 40]}
    huge = json.dumps(header | {name: tensor}).encode()
    for content in (
        (1 << 40).to_bytes(8, "little") + whole[8:],
        len(huge).to_bytes(8, "little") + huge + rest,
    ):
        path.write_bytes(content)
        assert path.name in refused("import", theirs, tmp_path / "out.pt")
    path.write_bytes(whole)
    edit(theirs / "config.json", num_hidden_layers=10**9)
    assert "1000000000 layers" in refused("import", theirs, tmp_path / "out.pt")


def test_incomplete_download_is_refused(refused, theirs, tmp_path):
    last = sorted(theirs.glob("*.safetensors"))[-1]
    index = theirs / "model.safetensors.index.json"
    out = tmp_path / "out.pt"
    whole = last.read_bytes()
    last.write_bytes(whole[:-8])
    assert f"{last.name} is truncated" in refused("import", theirs, out)
    last.unlink()
    assert f"lacks {last.name}" in refused("import", theirs, out)
    shutil.copy(sorted(theirs.glob("*.safetensors"))[0], last)
    assert "is also in another file" in refused("import", theirs, out)
    last.write_bytes(whole)
    (tmp_path / "elsewhere.safetensors").write_bytes(whole)
    named = json.loads(index.read_text())["weight_map"]
    outside = {name: "../elsewhere.safetensors" for name in named if named[name] == last.name}
    edit(index, weight_map=named | outside)
    assert "lacks ../elsewhere.safetensors" in refused("import", theirs, out)
    edit(index, weight_map={})
    assert "lacks all" in refused("import", theirs, out)


# ------------------------------------------------------------------------------------- nothing lost


def test_nothing_is_overwritten(refused, world, theirs, tmp_path, monkeypatch):
    out = tmp_path / "out.pt"
    folder = tmp_path / "folder"
    out.write_text("mine")
    assert "--overwrite" in refused("import", theirs, out)
    assert out.read_text() == "mine"
    convert("import", theirs, out, "--overwrite")
    assert common.load(out)["meta"]["recipe"] == "base"
    folder.mkdir()
    (folder / "mine").write_text("mine")
    for place in (folder, folder / "mine"):
        assert "is not an empty folder" in refused("export", world.taught, place)
    assert [p.name for p in folder.iterdir()] == ["mine"]
    (folder / "mine").unlink()

    def full(*words, **values):
        raise hf.SafetensorError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(hf, "save_file", full)
        assert "could not write" in refused("export", world.taught, folder)
    assert [*folder.iterdir()] == [] and not (tmp_path / "folder.new").exists()
    convert("export", world.taught, folder)
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_wrong_words(refused, world, theirs, tmp_path, capsys):
    out = tmp_path / "a"
    assert "--out" in refused("import", theirs)
    message = refused("import", theirs, tmp_path / "a.pt", "--revison", "main")
    assert "--revison" in message and "--revision?" in message
    assert str(tmp_path / "b") in refused("export", world.taught, out, tmp_path / "b")
    message = refused("export", world.taught, out, "--dtype", "int8")
    assert "--dtype" in message and "'int8'" in message
    assert "none.pt" in refused("export", tmp_path / "none.pt", out)
    assert "'exprot'" in refused("exprot")
    convert("--help")
    assert "python data/hf.py export" in capsys.readouterr().out
    saved = common.load(world.taught)
    saved["model"]["norm.weight"] = torch.ones(3)
    torch.save(saved, tmp_path / "odd.pt")
    assert "odd.pt is of another model" in refused("export", tmp_path / "odd.pt", out)
    assert not out.exists()


# ---------------------------------------------------------------------------------------- tokenizer


def real_texts(count=300):
    for name in (
        "pretrain_text/wikitext2_valid.txt.gz",
        "pretrain_text/tinyshakespeare.txt.gz",
        "pretrain_text/tinystories_sample.txt.gz",
    ):
        with gzip.open(DATASETS / name, "rt", encoding="utf-8") as file:
            yield from file.read()[:200_000].split("\n\n")[:count]
    for name in (
        "pretrain_text/open_logic.jsonl.gz",
        "math/train.jsonl.gz",
        "gsm8k/train.jsonl.gz",
        "hellaswag/validation.jsonl.gz",
    ):
        with gzip.open(DATASETS / name, "rt", encoding="utf-8") as file:
            for _, line in zip(range(count), file, strict=False):
                row = json.loads(line)
                yield "\n".join(str(value) for value in row.values())[:4000]


HARD_TEXTS = [
    hf.PROBE,
    "",
    " ",
    "  a",
    "a  ",
    "\n",
    "\r\n\r\n  x",
    "\t\t x\n\n\n",
    "1234567890 12 3",
    "\u00b2\u2167\u0663 ",
    "it's IT'S it'\u017f we'LL 'VE 're",
    "caf\u00e9 cafe\u0301 \ufb01",
    "\u6771\u4eac\u90fd\u3000\u306f",
    "\x00\x01\u2028\u00a0\u200b",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1ee\U0001f1f9",
    "<|endoftext|>",
    "a<|endoftext|>b <|pad|> <|im_start|> |||PHONE_NUMBER||| <|extra_id_3|> <|endofprompt|>",
    "||||||PHONE_NUMBER||||||",
    *(
        "".join(c * n)
        for c in (" ", "a", "-", "=", "\n", "0", "_", "x ")
        for n in (1, 2, 3, 5, 7, 16, 31, 77, 200)
    ),
]


def test_tokenizer_gives_our_ids(cl100k, tmp_path):
    """Through AutoTokenizer, on real text and on hard text, special tokens spelled out included."""
    folder = tmp_path / "hf"
    model = small_model(100278, 100352, torch.float32, width=8, heads=2, ffn=8, layers=1)
    common.save(tmp_path / "a.pt", model, {"encoding": "cl100k_base"})
    convert("export", tmp_path / "a.pt", folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    texts = [*HARD_TEXTS, *real_texts()]
    whole = dict(skip_special_tokens=False, clean_up_tokenization_spaces=False)
    for text, ids in zip(texts, theirs(texts).input_ids, strict=True):
        assert ids == tokens.encode(cl100k, text), text[:80]
        assert theirs.decode(ids, **whole) == text
    special = {theirs.convert_tokens_to_ids(text): text for text in hf.OLMO2}
    assert len(hf.OLMO2) == 22
    assert special == {100256 + i: text for i, text in enumerate(hf.OLMO2)}
    assert all(special[i] == text for text, i in cl100k._special_tokens.items())
    assert len(theirs) == tokens.vocab_size(cl100k)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (100257, 100277)
    assert (cl100k.eot_token, tokens.pad_id(cl100k)) == (100257, 100277)
    assert theirs.decode([9906, 100257, 100277], skip_special_tokens=True) == "Hello"
    # and it is what import accepts beside the weights
    convert("import", folder, tmp_path / "b.pt", "--tokens", "1")
    assert same_weights(tmp_path / "a.pt", tmp_path / "b.pt")


def test_toy_tokenizer(world, tmp_path):
    """The toy's own words, and the folder imports again."""
    convert("export", world.taught, tmp_path / "hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    enc = tokens.encoding("toy")
    for row in read_rows(world.data / "easy/train.jsonl"):
        text = f" Q : {row['question'].strip()} A : {row['solutions'][0].strip()}"
        ids = enc.encode_ordinary(text)
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text
    assert (theirs.eos_token_id, theirs.pad_token_id) == (enc.eot_token, tokens.pad_id(enc))
    convert("import", tmp_path / "hf", tmp_path / "again.pt", "--tokens", "1")
    assert same_weights(world.taught, tmp_path / "again.pt")


def test_another_tokenizer_is_refused(refused, theirs, tmp_path):
    other = Tokenizer(models.BPE({"a": 0, "<|endoftext|>": TOY - 2}, []))
    other.save(str(theirs / "tokenizer.json"))
    assert "tokenizer.json is not toy" in refused("import", theirs, tmp_path / "out.pt")
    (theirs / "tokenizer.json").write_text("{}")
    assert "cannot read" in refused("import", theirs, tmp_path / "out.pt")


# --------------------------------------------------------------------------------------- the stages


def sum_of(i):
    answer = str(i + 1)
    solutions = [f"{i} + 1 = {answer}\n#### {answer}"]
    known = {"id": str(i), "question": f"What is {i} + 1?", "answer": answer}
    return known | {"solutions": solutions}


def test_every_stage_starts_from_an_imported_checkpoint(cl100k, tmp_path):
    """rl, sft, mix and eval with nothing but --init and sizes: questions, encoding and recipe
    follow from the meta."""
    for split in ("train", "val", "shots"):
        write_rows(tmp_path / f"{split}.jsonl", map(sum_of, range(6)))
    model = small_model(100278, 100352, torch.float32, width=16, ffn=24)
    theirs = transformers_twin(model).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / NAMED, max_shard_size="4MB")
    start = tmp_path / "step10000.pt"
    tuned = tmp_path / "step10000-sft.pt"
    convert("import", tmp_path / NAMED, start, "--questions", tmp_path)
    shared = dict(steps=1, eval_questions=2, eval_n=2, max_new=6, compile="false")
    rollouts = dict(questions_per_step=2, group=2)
    call("sft", init=start, batch=2, **shared)
    call("rl", init=start, **rollouts, **shared)
    call("rl", init=tuned, **rollouts, **shared)
    call("mix", init=start, batch=2, **rollouts, **shared)
    recipes = {
        "step10000": "base",
        "step10000-sft": "sft",
        "step10000-rl": "rl",
        "step10000-sft-rl": "sft->rl",
        "step10000-mix": "mix",
    }
    paths = [tmp_path / f"{name}.pt" for name in recipes]
    sizes = dict(limit=2, n=2, k="1,2", shots="0", max_new=6, compile="false")
    call("eval", *paths, results=tmp_path / "results", **sizes)
    expected = dict(tokens=21 * 10**9, world="olmo-mix-1124", model="2x16", n=2)
    for path in paths:
        meta = common.load(path)["meta"]
        rows = read_rows(tmp_path / "results" / f"{path.stem}.jsonl")
        (row,) = (row for row in rows if row["kind"] == "pass")
        assert meta["recipe"] == row["recipe"] == recipes[path.stem]
        assert expected.items() <= row.items()
        if path != start:
            parent = common.load(meta["parent"])["meta"]
            assert meta["parent_hash"] == common.config_hash(parent)
    assert not same_weights(start, tuned)
    convert("export", paths[4], tmp_path / "mixed")  # and what the stages wrote goes back
    ids = torch.tensor([tokens.encode(cl100k, "Question: What is 1 + 1?\nAnswer:")])
    expected = our_logits(paths[4], ids)
    torch.testing.assert_close(their_logits(tmp_path / "mixed", ids), expected, rtol=0, atol=1e-4)

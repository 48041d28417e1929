"""The six benchmarks against lm-evaluation-harness: prompts, tokens, log-likelihoods and chosen
options, item by item.

The slow test runs lm-eval itself, with its stock task files, on 200 items of each (`pip install -r
tests/requirements-slow.txt`). The fast one compares 20 of each with the scores of lm-eval in
golden_tasks.json, which `PYTHONPATH=. python tests/test_tasks.py` writes anew. Both read the real
data; none of its text is in the golden file.
"""

import gzip
import hashlib
import itertools
import json
import os
import random
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import DATASETS, call, small_model

import eval as evaluation
from data import checkpoint, prepare, ranks, report, tasks, tokens
from model import Sampler

FILES = {
    "lambada_openai": "lambada/test.jsonl.gz",
    "hellaswag": "hellaswag/validation_raw_1000.jsonl.gz",
    "arc_easy": "arc/easy_test.jsonl.gz",
    "arc_challenge": "arc/challenge_test.jsonl.gz",
    "piqa": "piqa/validation.jsonl.gz",
    "openbookqa": "openbookqa/test.jsonl",
}
STOCK = {
    "lambada_openai": "lambada/lambada_openai",
    "arc_easy": "arc/arc_easy",
    "arc_challenge": "arc/arc_challenge",
}
GOLDEN = Path(__file__).with_name("golden_tasks.json")
ITEMS, KEPT = 200, 20  # of each benchmark: compared with a run of lm-eval, kept in the golden file
WORLD = ranks.World(0, 1, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The real files in the layout of --source, HellaSwag as published: lm-eval wants to prepare
    that itself.
    """
    if not DATASETS.is_dir():
        pytest.skip(f"no {DATASETS}: set RL_DATASETS to the folder of real data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(DATASETS / "tiktoken"))
        yield real_files(tmp_path_factory.mktemp("source"))


def real_files(folder):
    for name in FILES.values():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(DATASETS / name, folder / name.replace("_raw_1000", ""))
    return folder


@pytest.fixture(scope="module")
def model():
    return a_model()


def a_model():
    """OLMo2 with the whole vocabulary and random weights, wide enough apart that the scores of
    choices differ.
    """
    return small_model(vocab=100278, padded_vocab=100352, dtype=torch.float32, context=256).eval()


def chosen(items, count):
    """`count` places spread over all of them: both parts of HellaSwag, ARC with 3 to 5 choices."""
    return sorted(random.Random(0).sample(range(len(items)), count))


def hash_of(pairs):
    """Of the ids of each context and continuation."""
    return hashlib.sha256(
        json.dumps([[list(ids) for ids in pair] for pair in pairs]).encode()
    ).hexdigest()[:16]


def ours(model, items):
    """For each item {"ids": hash, "logp": of each choice, "acc", "acc_norm"}."""
    asked = []

    def loglikelihood(pairs, single):
        asked[:] = asked or [
            pairs,
            evaluation.continuation_log_probs(Sampler(model), pairs, single, WORLD),
        ]
        return asked[1]

    enc, rows = tokens.encoding("cl100k_base"), []
    hits = [
        tasks.score([item | {"metric": m} for item in items], enc, loglikelihood)["right"]
        for m in ("acc", "acc_norm")
    ]
    pairs, found = map(iter, asked)
    for item, acc, acc_norm in zip(items, *hits, strict=True):
        count = len(item["choices"])
        rows.append(
            {
                "ids": hash_of(itertools.islice(pairs, count)),
                "logp": [logp for logp, _ in itertools.islice(found, count)],
                "acc": acc,
                "acc_norm": acc_norm,
            }
        )
    return rows


def same(ours, theirs, items):
    """Same ids, log-likelihoods within 1e-4, the same option chosen, by both metrics.

    -> largest difference.
    """
    largest = 0.0
    for mine, other, item in zip(ours, theirs, items, strict=True):
        assert mine["ids"] == other["ids"], item
        assert mine["logp"] == pytest.approx(other["logp"], abs=1e-4), item
        largest = max(
            largest, *(abs(a - b) for a, b in zip(mine["logp"], other["logp"], strict=True))
        )
        for lengths in (1, [len(choice) - 1 for choice in item["choices"]]):
            assert np.argmax(np.array(mine["logp"]) / lengths) == np.argmax(
                np.array(other["logp"]) / lengths
            ), item
        assert all(
            mine[metric] == other[metric] for metric in ("acc", "acc_norm") if metric in other
        ), item
    return largest


# ---- lm-eval


def harness(model):
    """lm-eval's HFLM on transformers' twin of the model, the logits of ids that do not exist at
    -inf as in ours.

    Its sums are in fp64: in fp32 those of PIQA's long choices, of -600, are off by 1e-4.
    """
    from bench_cpu import transformers_twin
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    def no_dummies(_, __, logits):
        logits[..., model.config.vocab :] = -torch.inf
        return logits

    ranks = DATASETS / "tiktoken" / "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
    tokenizer = TikTokenConverter(
        vocab_file=str(ranks), extra_special_tokens=["<|100256|>", "<|endoftext|>"]
    ).converted()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    twin = transformers_twin(model).eval()
    twin.lm_head.register_forward_hook(no_dummies)
    return HFLM(
        pretrained=twin, tokenizer=tokenizer, device="cpu", batch_size=1, softmax_dtype="float64"
    )


def theirs(lm, source, places):
    """lm-eval's own run of its stock tasks on the local files: {name: rows as of `ours`}, acc_norm
    where it has one.
    """
    import lm_eval

    stock, folder = Path(lm_eval.__file__).parent / "tasks", source / "yaml"
    folder.mkdir()
    for name, file in FILES.items():
        splits = ", ".join(
            f"{split}: {source / file.replace('_raw_1000', '')}"
            for split in ("train", "validation", "test")
        )
        (folder / f"{name}.yaml").write_text(
            f"include: {stock / STOCK.get(name, f'{name}/{name}')}.yaml\ntask: local_{name}\n"
            "dataset_path: json\ndataset_name: null\n"
            f"dataset_kwargs: {{data_files: {{{splits}}}}}\n"
        )
    samples = lm_eval.simple_evaluate(
        lm,
        tasks=[f"local_{name}" for name in places],
        samples={f"local_{name}": where for name, where in places.items()},
        task_manager=lm_eval.tasks.TaskManager(include_path=str(folder)),
        num_fewshot=0,
        bootstrap_iters=0,
    )["samples"]
    return {
        name: [
            {
                "ids": hash_of(lm._encode_pair(*request) for request in sample["arguments"]),
                "logp": [float(response[0][0]) for response in sample["resps"]],
                **{
                    metric: int(sample[metric])
                    for metric in ("acc", "acc_norm")
                    if metric in sample
                },
            }
            for sample in sorted(samples[f"local_{name}"], key=lambda sample: sample["doc_id"])
        ]
        for name in places
    }


# ---- item by item


@pytest.mark.slow
def test_scores_equal_those_of_lm_eval(model, source, capsys):
    pytest.importorskip("lm_eval", reason="pip install -r tests/requirements-slow.txt")
    items, reference = reference_scores(model, source)
    for name, rows in items.items():
        assert len(rows) == ITEMS
        largest = same(ours(model, rows), reference[name], rows)
        choices = sum(len(row["choices"]) for row in rows)
        with capsys.disabled():
            print(
                f"\n{name:<15} {len(rows)} items, {choices} choices, largest difference "
                f"{largest:.1e}"
            )


@pytest.mark.slow
def test_odd_texts_and_greedy_answers_equal_those_of_lm_eval(model, source):
    """No context, spaces at its end, words that melt together, what is too long; answers that are
    greedy, or nearly.
    """
    pytest.importorskip("lm_eval", reason="pip install -r tests/requirements-slow.txt")
    from lm_eval.api.instance import Instance

    enc, lm = tokens.encoding("cl100k_base"), harness(model)
    texts = [
        ("", " word"),
        ("", "Word by word"),
        ("He said ", "yes"),
        ("He said  \n ", " yes, twice"),
        ("One line\n", "\n\nnext"),
        ("They were unbeliev", "ably rich in 199"),
        ("It costs $1", "0,000.50"),
        ("caf\u00e9 \U0001f642", " na\u00efve \u65e5\u672c\u8a9e"),
        ("One of many words. " * 99, " word"),
        ("a", " b" * 256),
    ]
    pairs = [tasks.encode_pair(enc, *text) for text in texts]
    assert [pair for pair, text in zip(pairs, texts, strict=True) if text[0]] == [
        lm._encode_pair(*text) for text in texts if text[0]
    ]
    expected = lm.loglikelihood(
        [Instance("loglikelihood", {}, text, 0) for text in texts], disable_tqdm=True
    )
    greedy = greedy_pairs(model)
    expected += lm._loglikelihood_tokens(
        [(("", str(i)), *pair) for i, pair in enumerate(greedy)], disable_tqdm=True
    )
    found = evaluation.continuation_log_probs(Sampler(model), pairs + greedy, True, WORLD)
    assert [x[0] for x in found] == pytest.approx([x[0] for x in expected], abs=1e-4)
    assert [x[1] for x in found] == [x[1] for x in expected] and sum(x[1] for x in found) >= len(
        greedy
    ) / 3


def reference_scores(model, source):
    items = {name: list(tasks.read(name, source)) for name in FILES}
    places = {name: chosen(rows, ITEMS) for name, rows in items.items()}
    return {name: [items[name][i] for i in places[name]] for name in items}, theirs(
        harness(model), source, places
    )


def greedy_pairs(model):
    """Contexts with what the sampler writes at temperature 0, and the same with its last and with
    its first token changed.
    """
    generator = torch.Generator().manual_seed(0)
    contexts = [
        torch.randint(0, 100256, (n,), generator=generator).tolist() for n in (1, 2, 3, 9, 9, 30)
    ]
    samples = Sampler(model)(contexts, 1, 4, list(range(6)), [100278], temperature=0)
    answers = samples.tokens.tolist()
    return [
        (context, change(answer))
        for context, answer in zip(contexts, answers, strict=True)
        for change in (list, lambda ids: [*ids[:-1], 7], lambda ids: [7, *ids[1:]])
    ]


def test_scores_equal_the_golden_ones_of_lm_eval(model, source):
    golden = json.loads(GOLDEN.read_text())
    for name, rows in golden["tasks"].items():
        items = list(tasks.read(name, source))
        items = [items[row["doc"]] for row in rows]
        assert len(items) == KEPT
        same(ours(model, items), rows, items)


def write_golden():
    """What lm-eval gives, cut down to a tenth; the model is made from its seed, the items are the
    files' own numbers.
    """
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TIKTOKEN_CACHE_DIR"] = str(DATASETS / "tiktoken")
        model, source = a_model(), real_files(Path(folder))
        items, reference = reference_scores(model, source)
        lines = []
        for name, rows in reference.items():
            same(ours(model, items[name]), rows, items[name])
            places = chosen(list(tasks.read(name, source)), ITEMS)
            kept = [
                {"doc": i, **row, "logp": [round(x, 5) for x in row["logp"]]}
                for i, row in zip(places, rows, strict=True)
            ]
            lines.append(
                f' "{name}": [\n  ' + ",\n  ".join(map(json.dumps, kept[:: ITEMS // KEPT])) + "\n ]"
            )
    GOLDEN.write_text('{"lm_eval": "0.4.13", "tasks": {\n' + ",\n".join(lines) + "\n}}\n")


# ---- scoring


def test_a_context_is_computed_once(model, monkeypatch):
    """Seen to fail with a row for each choice: 4 * (40 + 5) tokens."""
    ran, real = [], Sampler._prefill
    monkeypatch.setattr(
        Sampler,
        "_prefill",
        lambda self, ids, past=None: ran.append(ids.numel()) or real(self, ids, past),
    )
    context = list(range(100, 140))
    evaluation.continuation_log_probs(
        Sampler(model), [(context, [i] * 5) for i in range(4)], False, WORLD
    )
    assert sum(ran) == 39 + 4 * 5


def test_ranks_share_the_contexts(model):
    generator = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randint(0, 1000, (5 + i % 3,), generator=generator).tolist(), [i, i])
        for i in range(20)
    ]
    whole = evaluation.continuation_log_probs(Sampler(model), pairs, True, WORLD)
    parts = []
    for rank in range(2):
        world = SimpleNamespace(
            rank=rank, size=2, sum=lambda *values: parts.append(values) or list(values)
        )
        evaluation.continuation_log_probs(Sampler(model), pairs, True, world)
    assert [sum(x) for x in zip(*parts, strict=True)][::2] == pytest.approx(
        [logp for logp, _ in whole], abs=1e-5
    )
    assert all(
        0 in x for x in zip(*(part[::2] for part in parts), strict=True)
    )  # each pair on one rank


def test_a_single_choice_must_be_what_the_model_would_say(model):
    """Seen to fail with any choice right, as the best of one, and with the first token alone looked
    at.
    """
    pairs = greedy_pairs(model)
    found = evaluation.continuation_log_probs(Sampler(model), pairs, True, WORLD)
    assert [greedy for _, greedy in found] == [True, False, False] * 6
    items = [{"context": " sam has a", "choices": [" cat"], "label": 0}] * len(found)
    score = tasks.score(items, tokens.encoding("toy"), lambda *_: found)
    assert score["right"] == [1, 0, 0] * 6 and score["accuracy"] == score["acc"] == pytest.approx(
        1 / 3
    )
    assert score["perplexity"] == pytest.approx(np.exp(-np.mean([logp for logp, _ in found])))
    assert score["probability"] == pytest.approx(np.mean([np.exp(logp) for logp, _ in found]))


def test_acc_norm_is_by_characters_without_the_space():
    """Seen to fail with the space counted: -2 / 3 is above -4 / 5, and with tokens or sums for
    characters.
    """
    item = {"context": " sam has a", "choices": [" is", " dogs"], "label": 1}
    found = [(-2.0, False), (-3.9, False)]
    both = [
        tasks.score([item | more], tokens.encoding("toy"), lambda *_: found)
        for more in ({}, {"metric": "acc_norm"})
    ]
    assert [score["right"] for score in both] == [[0], [1]] and [
        score["accuracy"] for score in both
    ] == [0, 1]
    assert all(
        (score["acc"], score["acc_norm"]) == (0, 1) and "perplexity" not in score for score in both
    )


def test_task_score_by_hand(toy):
    """Seen to fail with the label compared with the choice of the lowest log-prob."""
    items = [
        {"context": " sam has a", "choices": [" cat", " dog"], "label": 1},
        {"context": " ann has a", "choices": [" red", " blue", " green"], "label": 0},
    ]
    table = {" cat": 0.1, " dog": 0.3, " red": 0.1, " blue": 0.2, " green": 0.1}

    def logprob(pairs, single):
        assert [tokens.decode(toy, context) for context, _ in pairs] == [" sam has a"] * 2 + [
            " ann has a"
        ] * 3
        return [(float(np.log(table[tokens.decode(toy, choice)])), single) for _, choice in pairs]

    score = tasks.score(items, toy, logprob)
    assert score["right"] == [1, 0] and score["accuracy"] == 0.5 and score["se"] == 0.5
    assert score["probability"] == pytest.approx((0.75 + 0.25) / 2)
    lower = tasks.score(
        items, toy, lambda *args: [(x - 1000, greedy) for x, greedy in logprob(*args)]
    )
    assert lower["probability"] == pytest.approx(0.5)


def test_a_choice_is_encoded_with_its_context(source):
    """Seen to fail with the two encoded one by one, and with the spaces left to the context."""
    enc = tokens.encoding("cl100k_base")
    assert tasks.encode_pair(enc, "", " word") == ([enc.eot_token], enc.encode(" word"))
    assert tasks.encode_pair(enc, "He said ", "yes") == (enc.encode("He said"), enc.encode(" yes"))
    assert tasks.encode_pair(enc, "$1", "0,000") == (
        enc.encode("$1"),
        enc.encode("$10,000")[2:],
    )  # "10" is one token
    with pytest.raises(ValueError, match="'thing' melts into the last word of 'Some'"):
        tasks.encode_pair(enc, "Some", "thing")


@pytest.mark.parametrize(
    "change",
    [
        {"label": 2},
        {"label": -1},
        {"label": True},
        {"label": "1"},
        {"choices": [" a"]},
        {"choices": []},
        {"choices": [" a", ""]},
        {"choices": [" a", " "]},
        {"choices": [" a", 3]},
        {"context": None},
        {"context": "a \ud800"},
        {"metric": "accuracy"},
    ],
    ids=str,
)
def test_malformed_item_is_named_with_its_line(tmp_path, change):
    """Seen to fail without the check of label and choices."""
    item = {"context": " sam has a", "choices": [" cat", " dog"], "label": 1, "metric": "acc_norm"}
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps(item) + "\n" + json.dumps(item | change) + "\n")
    with pytest.raises(ValueError, match="facts.jsonl:2: "):
        tasks.load(tmp_path)
    path.write_text(json.dumps(item) + "\n")
    assert tasks.load(tmp_path) == {"facts": [item]}


def test_hidden_file_is_no_task(tmp_path):
    """A Mac leaves them on other disks. Seen to fail with "._facts" as a second task."""
    text = json.dumps({"context": "a", "choices": [" b", " c"], "label": 0}) + "\n"
    for name in ("facts", "._facts"):
        (tmp_path / f"{name}.jsonl").write_text(text)
    assert [*tasks.load(tmp_path)] == ["facts"]


@pytest.mark.parametrize("change", ["missing", "added", "shorter"])
def test_folder_of_tasks_knows_what_it_holds(source, tmp_path, change):
    """A task more or less changes the mean. Seen to fail without the list in world.json."""
    out = tmp_path / "tasks"
    prepare.main(["tasks", "--source", str(source), "--out", str(out), "--limit", "3"])
    assert len(tasks.load(out)) == 6
    if change == "missing":
        (out / "piqa.jsonl").unlink()
    elif change == "added":
        shutil.copy(out / "lambada_openai.jsonl", out / "piqa copy.jsonl")
    else:
        text = (out / "piqa.jsonl").read_text()
        (out / "piqa.jsonl").write_text("".join(text.splitlines(keepends=True)[:2]))
    with pytest.raises(ValueError, match="piqa"):
        tasks.load(out)


# ---- sources

FOUR = {"text": ["a", "b", "c", "d"], "label": ["1", "2", "3", "4"]}
ROWS = {  # with the columns of the hub: row, context, choices, label
    "lambada_openai": (
        {"text": 'He said:\n\n"Give it\nto Ana'},
        'He said:\n\n"Give it\nto',
        [" Ana"],
        0,
    ),
    "hellaswag": (
        {
            "ind": 4,
            "activity_label": "Health",
            "ctx_a": "[header] How to rest [title] Lie down. [step] Close your eyes.",
            "ctx_b": "then you",
            "ctx": "-",
            "endings": ["sleep.", "[substeps] Sit up. [title] Run. ", "dream", "wake"],
            "source_id": "-",
            "split": "val",
            "split_type": "indomain",
            "label": "3",
        },
        "Health: How to rest. Lie down. Close your eyes. Then you",
        [" sleep.", "  Sit up.. Run.", " dream", " wake"],
        3,
    ),
    "arc_easy": (
        {"id": "x", "question": "Which?", "choices": FOUR, "answerKey": "3"},
        "Question: Which?\nAnswer:",
        [" a", " b", " c", " d"],
        2,
    ),
    "piqa": (
        {"goal": "dry a cup", "sol1": "use air ", "sol2": "use water", "label": 1},
        "Question: dry a cup\nAnswer:",
        [" use air ", " use water"],
        1,
    ),
    "openbookqa": (
        {"id": "x", "question_stem": "Ice is", "choices": FOUR, "answerKey": " 1"},
        "Ice is",
        [" a", " b", " c", " d"],
        0,
    ),
}
ROWS["arc_challenge"] = ROWS["arc_easy"]


def test_from_the_hub_and_from_files(monkeypatch, tmp_path):
    """The columns of the hub, offline.

    That repository, config and split are those of lm-eval is in the slow test.
    """
    import datasets

    asked = []
    for name, (row, context, choices, label) in ROWS.items():
        monkeypatch.setattr(
            datasets,
            "load_dataset",
            lambda *args, row=row, **kwargs: (
                asked.append((*args, kwargs["split"])) or datasets.Dataset.from_list([row])
            ),
        )
        expected = [
            {
                "context": context,
                "choices": choices,
                "label": label,
                "metric": tasks.BENCHMARKS[name].metric,
            }
        ]
        assert list(tasks.read(name)) == expected and asked[-1] == tasks.BENCHMARKS[name].hub
        path = tmp_path / f"{tasks.BENCHMARKS[name].file}.jsonl.gz"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(json.dumps(row).encode()))
        assert list(tasks.read(name, tmp_path)) == expected
        path.write_bytes(gzip.compress(json.dumps(dict([*row.items()][:-1])).encode()))
        with pytest.raises(ValueError, match=f"jsonl.gz:1: .*{name}"):
            list(tasks.read(name, tmp_path))
        path.unlink()
        with pytest.raises(ValueError, match=f"{name}: no .*jsonl"):
            list(tasks.read(name, tmp_path))


@pytest.mark.slow
def test_hub_names_are_those_of_lm_eval():
    lm_eval = pytest.importorskip("lm_eval", reason="pip install -r tests/requirements-slow.txt")
    for name, benchmark in tasks.BENCHMARKS.items():
        text = (
            Path(lm_eval.__file__).parent / "tasks" / f"{STOCK.get(name, f'{name}/{name}')}.yaml"
        ).read_text()
        repository, config, split = benchmark.hub
        if name != "arc_challenge":  # which includes arc_easy's
            assert f"dataset_path: {repository}\n" in text and f"\n{split}_split: {split}\n" in text
            assert split == "test" or "\ntest_split: null\n" in text
        assert f"\ndataset_name: {config or 'null'}\n" in text + "\n"


def test_prepared_hellaswag_is_the_published_one(source):
    """Prompts and answers letter for letter; choices but for the space that a mark leaves before
    them.
    """

    def key(item):
        return (
            item["context"],
            *(" ".join(choice.split()) for choice in item["choices"]),
            item["label"],
        )

    published = list(tasks.read("hellaswag", source))
    assert {key(item) for item in published} <= {
        key(item) for item in tasks.read("hellaswag", DATASETS)
    }
    assert (
        len(published) == 1000
        and sum(choice.startswith("  ") for item in published for choice in item["choices"]) == 134
    )


def test_from_files_to_the_report(source, world, tmp_path, capsys, model):
    """prepare.py, eval.py and the report on the six, with a random model of the real vocabulary."""
    prepare.main(
        ["tasks", "--source", str(source), "--out", str(tmp_path / "tasks"), "--limit", "3"]
    )
    assert capsys.readouterr().out.count(" 3 items, ") == 6
    assert tasks.load(tmp_path / "tasks") == {
        name: list(itertools.islice(tasks.read(name, source), 3)) for name in FILES
    }
    meta = checkpoint.load(world.base)["meta"] | {
        "encoding": "cl100k_base",
        "questions": str(world.data / "easy"),
    }
    checkpoint.save(tmp_path / "m.pt", model, meta)
    how = dict(
        results=tmp_path / "results",
        tasks=tmp_path / "tasks",
        limit=1,
        n=1,
        k=1,
        max_new=1,
        shots=0,
        device="cpu",
        compile="false",
    )
    call("eval", tmp_path / "m.pt", **how)
    rows = [row for row in report.read(tmp_path / "results")[0] if row["kind"] == "general"]
    assert {row["benchmark"] for row in rows} == set(FILES)
    for row in rows:
        assert (
            len(row["right"]) == 3
            and row["accuracy"]
            == row[tasks.BENCHMARKS[row["benchmark"]].metric]
            == sum(row["right"]) / 3
        )
    level = report.Results(rows).level("base", rows[0]["tokens"], "accuracy")
    assert level.mean == pytest.approx(np.mean([row["accuracy"] for row in rows]))


if __name__ == "__main__":
    write_golden()

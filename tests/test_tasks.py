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

import common
from data import prepare, tasks, tokens
from data.files import read_rows, write_rows
from eval import continuation_log_probs
from helpers import ALONE, DATASETS, call, small_model
from model import Model, Sampler

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
ITEMS = 200  # of each benchmark: compared with a run of lm-eval
KEPT = 20  # in the golden file


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The real files in the layout of --source; HellaSwag as published, since lm-eval wants to
    prepare that itself."""
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
    """OLMo2 with the whole vocabulary and random weights, large enough for choices to differ."""
    return small_model(vocab=100278, padded_vocab=100352, dtype=torch.float32, context=256).eval()


def chosen(items, count):
    """`count` places spread over all of them: both parts of HellaSwag, ARC with 3 to 5 choices."""
    return sorted(random.Random(0).sample(range(len(items)), count))


def hash_of(pairs):
    """Of the ids of each context and continuation."""
    text = json.dumps([[list(ids) for ids in pair] for pair in pairs])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def ours(model, items):
    """For each item {"ids": hash, "logp": of each choice, "acc", "acc_norm"}."""
    asked = []

    def loglikelihood(pairs, single):
        if not asked:
            asked.extend([pairs, continuation_log_probs(model, pairs, single, ALONE)])
        return asked[1]

    encoding = tokens.encoding("cl100k_base")

    def hits(metric):
        chosen_so = [item | {"metric": metric} for item in items]
        return tasks.score(chosen_so, encoding, loglikelihood)["right"]

    rows = []
    by_metric = hits("acc"), hits("acc_norm")
    pairs, found = map(iter, asked)
    for item, acc, acc_norm in zip(items, *by_metric, strict=True):
        count = len(item["choices"])
        ids = hash_of(itertools.islice(pairs, count))
        logp = [logp for logp, _ in itertools.islice(found, count)]
        rows.append({"ids": ids, "logp": logp, "acc": acc, "acc_norm": acc_norm})
    return rows


def same(ours, theirs, items):
    """Same ids, log-likelihoods within 1e-4, the same option chosen, by both metrics.

    -> largest difference.
    """
    largest = 0.0
    for mine, other, item in zip(ours, theirs, items, strict=True):
        assert mine["ids"] == other["ids"], item
        one = np.array(mine["logp"])
        two = np.array(other["logp"])
        assert one == pytest.approx(two, abs=1e-4), item
        largest = max(largest, float(abs(one - two).max()))
        for lengths in (1, [len(choice) - 1 for choice in item["choices"]]):
            assert np.argmax(one / lengths) == np.argmax(two / lengths), item
        for metric in {"acc", "acc_norm"} & other.keys():
            assert mine[metric] == other[metric], item
    return largest


# ---- lm-eval


def harness(model):
    """lm-eval's HFLM on transformers' twin of the model, the logits of ids that do not exist at
    -inf as in ours.

    Its sums are in fp64: in fp32 those of PIQA's long choices, of -600, are off by 1e-4.
    """
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    from twin import transformers_twin

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
    """lm-eval's own run of its stock tasks on the local files: {name: rows as of `ours`}.

    acc_norm where it has one.
    """
    import lm_eval

    stock = Path(lm_eval.__file__).parent / "tasks"
    folder = source / "yaml"
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

    def row(sample):
        metrics = {name: int(sample[name]) for name in ("acc", "acc_norm") if name in sample}
        ids = hash_of(lm._encode_pair(*request) for request in sample["arguments"])
        return {"ids": ids, "logp": [float(x[0][0]) for x in sample["resps"]], **metrics}

    found = {}
    for name in places:
        ordered = sorted(samples[f"local_{name}"], key=lambda sample: sample["doc_id"])
        found[name] = list(map(row, ordered))
    return found


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
    """No context, spaces at its end, words that melt together, what is too long, greedy answers."""
    pytest.importorskip("lm_eval", reason="pip install -r tests/requirements-slow.txt")
    from lm_eval.api.instance import Instance

    enc = tokens.encoding("cl100k_base")
    lm = harness(model)
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
    for pair, text in zip(pairs, texts, strict=True):
        assert not text[0] or pair == lm._encode_pair(*text)
    asked = [Instance("loglikelihood", {}, text, 0) for text in texts]
    expected = lm.loglikelihood(asked, disable_tqdm=True)
    greedy = greedy_pairs(model)
    asked = [(("", str(i)), *pair) for i, pair in enumerate(greedy)]
    expected += lm._loglikelihood_tokens(asked, disable_tqdm=True)
    found = continuation_log_probs(model, pairs + greedy, True, ALONE)
    assert [x[0] for x in found] == pytest.approx([x[0] for x in expected], abs=1e-4)
    assert [x[1] for x in found] == [x[1] for x in expected]
    assert sum(x[1] for x in found) >= len(greedy) / 3


def reference_scores(model, source):
    items = {name: list(tasks.read(name, source)) for name in FILES}
    places = {name: chosen(rows, ITEMS) for name, rows in items.items()}
    scores = theirs(harness(model), source, places)
    return {name: [items[name][i] for i in places[name]] for name in items}, scores


def greedy_pairs(model):
    """Contexts with what the sampler writes at temperature 0; also with its last, or first, token
    changed."""
    generator = torch.Generator().manual_seed(0)

    def ids(length):
        return torch.randint(0, 100256, (length,), generator=generator).tolist()

    contexts = [ids(length) for length in (1, 2, 3, 9, 9, 30)]
    samples = Sampler(model)(contexts, 1, 4, list(range(6)), [100278], temperature=0)
    pairs = []
    for context, answer in zip(contexts, samples.tokens.tolist(), strict=True):
        pairs += [(context, answer), (context, [*answer[:-1], 7]), (context, [7, *answer[1:]])]
    return pairs


def test_scores_equal_the_golden_ones_of_lm_eval(model, source):
    golden = json.loads(GOLDEN.read_text())
    for name, rows in golden["tasks"].items():
        items = list(tasks.read(name, source))
        items = [items[row["doc"]] for row in rows]
        assert len(items) == KEPT
        same(ours(model, items), rows, items)


def write_golden():
    """A tenth of what lm-eval gives; the model is made from its seed, items go by their numbers."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TIKTOKEN_CACHE_DIR"] = str(DATASETS / "tiktoken")
        model = a_model()
        source = real_files(Path(folder))
        items, reference = reference_scores(model, source)
        lines = []
        for name, rows in reference.items():
            same(ours(model, items[name]), rows, items[name])
            places = chosen(list(tasks.read(name, source)), ITEMS)
            kept = [
                {"doc": i, **row, "logp": [round(x, 5) for x in row["logp"]]}
                for i, row in zip(places, rows, strict=True)
            ]
            few = ",\n  ".join(map(json.dumps, kept[:: ITEMS // KEPT]))
            lines.append(f' "{name}": [\n  {few}\n ]')
    GOLDEN.write_text('{"lm_eval": "0.4.13", "tasks": {\n' + ",\n".join(lines) + "\n}}\n")


# ---- scoring


def test_a_context_is_computed_once(model, monkeypatch):
    ran = []
    real = Model.hidden

    def hidden(self, ids, layout=None):
        ran.append(ids.numel())
        return real(self, ids, layout)

    monkeypatch.setattr(Model, "hidden", hidden)
    context = list(range(100, 140))
    continuation_log_probs(model, [(context, [i] * 5) for i in range(4)], False, ALONE)
    assert sum(ran) == -(-(39 + 4 * 5) // 8) * 8  # rows are filled up to a multiple of 8


def test_a_pass_has_a_budget(model, monkeypatch):
    """Contexts of all lengths: no pass of many rows is larger, and each pair has its own score."""
    sizes = []
    real = Model.hidden

    def hidden(self, ids, layout=None):
        sizes.append(ids.shape)
        return real(self, ids, layout)

    generator = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randint(0, 1000, (1 + 5 * i % 31,), generator=generator).tolist(), [i, i + 1])
        for i in range(40)
    ]
    alone = [continuation_log_probs(model, [pair], True, ALONE)[0] for pair in pairs]
    monkeypatch.setattr(Model, "hidden", hidden)
    together = continuation_log_probs(model, pairs, True, ALONE, budget=200)
    assert len(sizes) > 5
    assert all(rows == 1 or rows * length <= 200 for rows, length in sizes)
    assert [x[0] for x in together] == pytest.approx([x[0] for x in alone], abs=1e-4)
    assert [x[1] for x in together] == [x[1] for x in alone]


def test_what_is_too_long_loses_its_first_tokens(model):
    """As in lm-eval; a choice that alone is too long is refused."""
    context = list(range(300))
    ((whole, _),) = continuation_log_probs(model, [(context, [5, 6])], False, ALONE)
    ((fitting, _),) = continuation_log_probs(model, [(context[-255:], [5, 6])], False, ALONE)
    ((shorter, _),) = continuation_log_probs(model, [(context[-254:], [5, 6])], False, ALONE)
    assert whole == fitting != shorter
    with pytest.raises(ValueError, match="257"):
        continuation_log_probs(model, [([1], [5] * 257)], False, ALONE)


def test_ranks_share_the_contexts(model):
    generator = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randint(0, 1000, (5 + i % 3,), generator=generator).tolist(), [i, i])
        for i in range(20)
    ]
    whole = continuation_log_probs(model, pairs, True, ALONE)
    parts = []

    def kept(*values):
        parts.append(values)
        return list(values)

    for rank in range(2):
        world = SimpleNamespace(rank=rank, size=2, sum=kept, device=ALONE.device)
        continuation_log_probs(model, pairs, True, world)
    one, other = (part[::2] for part in parts)
    assert np.add(one, other) == pytest.approx([logp for logp, _ in whole], abs=1e-5)
    assert not np.multiply(one, other).any()  # each pair on one rank


def test_a_single_choice_must_be_what_the_model_would_say(model):
    pairs = greedy_pairs(model)
    found = continuation_log_probs(model, pairs, True, ALONE)
    assert [greedy for _, greedy in found] == [True, False, False] * 6
    items = [{"context": " sam has a", "choices": [" cat"], "label": 0}] * len(found)
    score = tasks.score(items, tokens.encoding("toy"), lambda *_: found)
    assert score["right"] == [1, 0, 0] * 6
    assert score["accuracy"] == score["acc"] == pytest.approx(1 / 3)
    assert score["perplexity"] == pytest.approx(np.exp(-np.mean([logp for logp, _ in found])))
    assert score["probability"] == pytest.approx(np.mean([np.exp(logp) for logp, _ in found]))


def test_acc_norm_is_by_characters_without_the_space():
    item = {"context": " sam has a", "choices": [" is", " dogs"], "label": 1}
    found = [(-2.0, False), (-3.9, False)]
    for more, right in (({}, 0), ({"metric": "acc_norm"}, 1)):
        score = tasks.score([item | more], tokens.encoding("toy"), lambda *_: found)
        assert (score["right"], score["accuracy"]) == ([right], right)
        assert (score["acc"], score["acc_norm"]) == (0, 1)
        assert "perplexity" not in score


def test_task_score_by_hand(toy):
    items = [
        {"context": " sam has a", "choices": [" cat", " dog"], "label": 1},
        {"context": " ann has a", "choices": [" red", " blue", " green"], "label": 0},
    ]
    table = {" cat": 0.1, " dog": 0.3, " red": 0.1, " blue": 0.2, " green": 0.1}

    def logprob(pairs, single):
        contexts = [tokens.decode(toy, context) for context, _ in pairs]
        assert contexts == [" sam has a"] * 2 + [" ann has a"] * 3
        return [(float(np.log(table[tokens.decode(toy, choice)])), single) for _, choice in pairs]

    score = tasks.score(items, toy, logprob)
    assert score["right"] == [1, 0] and score["accuracy"] == 0.5 and score["se"] == 0.5
    assert score["probability"] == pytest.approx((0.75 + 0.25) / 2)

    def much_lower(*asked):
        return [(x - 1000, greedy) for x, greedy in logprob(*asked)]

    lower = tasks.score(items, toy, much_lower)
    assert lower["probability"] == pytest.approx(0.5)


def test_a_choice_is_encoded_with_its_context(source):
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
    item = {"context": " sam has a", "choices": [" cat", " dog"], "label": 1, "metric": "acc_norm"}
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps(item) + "\n" + json.dumps(item | change) + "\n")
    with pytest.raises(ValueError, match="facts.jsonl:2: "):
        tasks.load(tmp_path)
    path.write_text(json.dumps(item) + "\n")
    assert tasks.load(tmp_path) == {"facts": [item]}


def test_hidden_file_is_no_task(tmp_path):
    """A Mac leaves them on other disks."""
    text = json.dumps({"context": "a", "choices": [" b", " c"], "label": 0}) + "\n"
    for name in ("facts", "._facts"):
        (tmp_path / f"{name}.jsonl").write_text(text)
    assert [*tasks.load(tmp_path)] == ["facts"]


@pytest.mark.parametrize("change", ["missing", "added", "shorter"])
def test_folder_of_tasks_knows_what_it_holds(source, tmp_path, change):
    """A task more or less changes the mean."""
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
QUESTION = {"id": "a", "question": "What is 1 + 1?", "answer": "2", "solutions": ["#### 2"]}


def test_from_the_hub_and_from_files(monkeypatch, tmp_path):
    """The columns of the hub, offline; its names are compared with lm-eval's in a slow test."""
    import datasets

    asked = []
    for name, (row, context, choices, label) in ROWS.items():
        benchmark = tasks.BENCHMARKS[name]

        def load_dataset(repository, config, split, row=row):
            asked.append((repository, config, split))
            return datasets.Dataset.from_list([row])

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        item = {"context": context, "choices": choices, "label": label}
        expected = [item | {"metric": benchmark.metric}]
        assert list(tasks.read(name)) == expected
        assert asked[-1] == benchmark.hub
        path = tmp_path / f"{benchmark.file}.jsonl.gz"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(json.dumps(row).encode()))
        assert list(tasks.read(name, tmp_path)) == expected
        path.write_bytes(gzip.compress(json.dumps(dict([*row.items()][:-1])).encode()))
        with pytest.raises(ValueError, match=f"jsonl.gz:1: .*{name}"):
            list(tasks.read(name, tmp_path))
        path.unlink()
        with pytest.raises(ValueError, match=f"no {benchmark.file}.jsonl"):
            list(tasks.read(name, tmp_path))


@pytest.mark.slow
def test_hub_names_are_those_of_lm_eval():
    lm_eval = pytest.importorskip("lm_eval", reason="pip install -r tests/requirements-slow.txt")
    for name, benchmark in tasks.BENCHMARKS.items():
        stock = Path(lm_eval.__file__).parent / "tasks"
        text = (stock / f"{STOCK.get(name, f'{name}/{name}')}.yaml").read_text()
        repository, config, split = benchmark.hub
        if name != "arc_challenge":  # which includes arc_easy's
            assert f"dataset_path: {repository}\n" in text and f"\n{split}_split: {split}\n" in text
            assert split == "test" or "\ntest_split: null\n" in text
        assert f"\ndataset_name: {config or 'null'}\n" in text + "\n"


def test_prepared_hellaswag_is_the_published_one(source):
    """Letter for letter, but for the space that a mark leaves before a choice."""

    def key(item):
        choices = [" ".join(choice.split()) for choice in item["choices"]]
        return item["context"], *choices, item["label"]

    published = list(tasks.read("hellaswag", source))
    prepared = {key(item) for item in tasks.read("hellaswag", DATASETS)}
    assert len(published) == 1000
    assert {key(item) for item in published} <= prepared
    choices = [choice for item in published for choice in item["choices"]]
    assert sum(choice.startswith("  ") for choice in choices) == 134


def test_from_files_to_rows(source, world, tmp_path, capsys, model):
    """prepare.py and eval.py on the six, with a random model of the real vocabulary."""
    folder = tmp_path / "tasks"
    prepare.main(["tasks", "--source", str(source), "--out", str(folder), "--limit", "3"])
    assert capsys.readouterr().out.count(" 3 items, ") == 6
    first = {name: list(itertools.islice(tasks.read(name, source), 3)) for name in FILES}
    assert tasks.load(folder) == first
    write_rows(tmp_path / "questions/val.jsonl", [QUESTION])
    meta = {"encoding": "cl100k_base", "questions": str(tmp_path / "questions")}
    common.save(tmp_path / "m.pt", model, common.load(world.base)["meta"] | meta)
    sizes = dict(limit=1, n=1, k=1, max_new=1, shots=0, device="cpu", compile="false")
    call("eval", tmp_path / "m.pt", results=tmp_path / "results", tasks=folder, **sizes)
    rows = read_rows(tmp_path / "results/m.jsonl")
    rows = [row for row in rows if row["kind"] == "general"]
    assert {row["benchmark"] for row in rows} == set(FILES)
    for row in rows:
        metric = tasks.BENCHMARKS[row["benchmark"]].metric
        assert len(row["right"]) == 3
        assert row["accuracy"] == row[metric] == sum(row["right"]) / 3


if __name__ == "__main__":
    write_golden()

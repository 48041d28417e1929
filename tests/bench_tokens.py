"""Tokens a second of data/prepare.py beside tiktoken's own batch encoding of the same text, on this machine, in one run.

    RL_DATASETS=FOLDER python tests/bench_tokens.py [--json]

Ours is the whole command: rows read from .jsonl files on disk, tokenised by as many processes as tiktoken has threads,
written as shards and read back. tiktoken has the texts in memory and returns lists. The two sides take turns, and the
ratio is the median over the turns, because the speed of a shared machine drifts.
"""

import argparse
import contextlib
import io
import json
import os
import tempfile
from pathlib import Path

from bench_cpu import turns
from helpers import DATASETS

from data import corpus, prepare, tokens


def real_texts(folder, copies):
    """The documents of FOLDER/pretrain_text, as prepare.py cuts them, `copies` times."""
    files = corpus.local_files(folder / "pretrain_text")
    raw = [
        (file, number, text) for file in files for number, text in corpus.documents(file, 0, None)
    ]
    return [
        text if file.prose else corpus.text_of(file.name, number, text)
        for file, number, text in raw
    ] * copies


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object as the last line"
    )
    parser.add_argument("--turns", type=int, default=5, help="turns of each side")
    parser.add_argument("--copies", type=int, default=8, help="of the 2.5M tokens of real text")
    parser.add_argument("--processes", type=int, default=2, help="of ours, and threads of tiktoken")
    args = parser.parse_args()
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(DATASETS / "tiktoken"))
    enc, texts = tokens.encoding("cl100k_base"), real_texts(DATASETS, args.copies)
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/texts.jsonl", "w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        cfg = prepare.Text(
            source=file.name, out=f"{folder}/out", processes=args.processes, overwrite=True
        )

        def ours():
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                prepare.make_text(cfg)

        def theirs():
            enc.encode_ordinary_batch(texts, num_threads=args.processes)

        a, b, ratio = turns(ours, theirs, args.turns)
        done = sum(tokens.read_header(path).count for path in Path(cfg.out).glob("*.bin"))
    print(
        f"{done:,} tokens of {len(texts):,} documents, {args.processes} processes and threads (tokens/s)"
    )
    print(
        f"prepare.py text {done / a:12,.0f}\ntiktoken batch  {done / b:12,.0f}\nratio           {ratio:12.2f}"
    )
    if args.json:
        print(json.dumps({"prepare_vs_tiktoken": round(ratio, 3)}))


if __name__ == "__main__":
    main()

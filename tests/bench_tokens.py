"""Tokens a second of data/prepare.py beside tiktoken's own batch encoding of the same text.

    RL_DATASETS=FOLDER python tests/bench_tokens.py [--json]

Ours is the whole command: rows read from .jsonl files on disk, tokenised by as many processes as
tiktoken has threads, written as shards and read back. tiktoken has the texts in memory and returns
lists. The sides take turns, and the ratio is the median over turns.
"""

import contextlib
import io
import os
import tempfile
from pathlib import Path

import bench
from data import corpus, prepare, tokens
from data.files import write_rows
from helpers import DATASETS


def real_texts(folder, copies):
    """The documents of FOLDER/pretrain_text, as prepare.py divides them, `copies` times."""
    texts = []
    for file in corpus.local_files(folder / "pretrain_text"):
        for number, text in corpus.documents(file, 0, None):
            texts.append(text if file.prose else corpus.text_of(file.name, number, text))
    return texts * copies


def main():
    flags = bench.parser(__doc__, turns=5)
    flags.add_argument("--copies", type=int, default=8, help="of the 2.5M tokens of real text")
    flags.add_argument("--processes", type=int, default=2, help="of ours; threads of tiktoken")
    args = flags.parse_args()
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(DATASETS / "tiktoken"))
    encoding = tokens.encoding("cl100k_base")
    texts = real_texts(DATASETS, args.copies)
    with tempfile.TemporaryDirectory() as folder:
        source = f"{folder}/texts.jsonl"
        write_rows(source, [{"text": text} for text in texts])
        how = dict(out=f"{folder}/out", processes=args.processes, overwrite=True)
        cfg = prepare.Text(source=source, **how)

        def ours():
            silent = io.StringIO()
            with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
                prepare.make_text(cfg)

        def theirs():
            encoding.encode_ordinary_batch(texts, num_threads=args.processes)

        first, second, ratio = bench.turns(ours, theirs, args.turns)
        done = sum(tokens.read_header(path).count for path in Path(cfg.out).glob("*.bin"))
    bench.show(
        f"{done:,} tokens of {len(texts):,} documents, {args.processes} processes and threads",
        ["", "tokens/s", "ratio"],
        [
            ["prepare.py text", bench.number(done / first), bench.number(ratio, ".2f")],
            ["tiktoken batch", bench.number(done / second), "1.00"],
        ],
    )
    bench.finish(args, {"prepare_vs_tiktoken": round(ratio, 3)})


if __name__ == "__main__":
    main()

"""Rows -> report.md and figures beside them, and what a person reads in the terminal."""

import json
import re
from pathlib import Path

from data.files import whole_file
from results import along, figures, tables
from results.findings import decide
from results.rows import Record, read

BLOCK = re.compile(r"(?<=<!-- findings -->\n).*?(?=<!-- /findings -->)", re.DOTALL)


def write(path, text):
    with whole_file(path) as file:
        file.write(text)


def one(folder, brief=False):
    """Writes report.md and figures of a folder of rows, prints what they say; -> the verdicts, and
    those without the rule of convergence."""
    frame, torn = read(folder)
    r = Record(frame)
    verdicts = decide(r)
    pictures = figures.draw(r, folder)
    runs = along.overtaking(r), along.answers_compared(r)
    waived = decide(r, waived=True)
    write(folder / "report.md", tables.page(r, verdicts, waived, pictures, torn, runs))
    lines = [f"{folder}: {r.split} questions, in %", *torn]
    lines += [] if brief else [tables.grid(r), ""]
    lines += tables.directions(r, verdicts)
    lines += [f"figure: {folder / name}" for name in pictures[:1]]
    print("\n".join([*lines, f"tables: {folder / 'report.md'}", ""]))
    return verdicts, waived


def report(folder, as_json=False):
    """A folder of rows: its report. A folder of such folders, record-1, record-2 and others, gives
    each its own, and the verdicts of the records side by side in findings.md and between the
    marks <!-- findings --> of RESULTS.md in the folder above.

    as_json: prints {"findings": {"1": verdict, ...}, "record-2": ...} as the last line. Returns
    {"1": Verdict, ...} of the (first) record. Raises ValueError for rows that cannot be read.
    """
    folder = Path(folder)
    records = sorted(path.name for path in folder.glob("record-*") if path.is_dir())
    if records:
        others = {path.parent.name for path in folder.glob("*/*.jsonl")} - set(records)
        found = {name: one(folder / name, True) for name in [*records, *sorted(others)]}
        found = {name: found[name] for name in records}
        block = tables.block(found)
        write(folder / "findings.md", block)
        prose = folder.resolve().parent / "RESULTS.md"
        if prose.exists() and BLOCK.search(text := prose.read_text(encoding="utf-8")):
            write(prose, BLOCK.sub(lambda _: block, text))
    else:
        found = {folder.name: one(folder)}
    verdicts = {name: decided for name, (decided, _) in found.items()}
    first, *more = verdicts
    if as_json:
        said = {name: {n: v.verdict for n, v in found.items()} for name, found in verdicts.items()}
        print(json.dumps({"findings": said[first], **{name: said[name] for name in more}}))
    return verdicts[first]

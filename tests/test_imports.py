"""The arrows of the design: who may import whom, and what the scripts can do without."""

import ast
import os
import subprocess
import sys

import pytest

from helpers import ROOT

SCRIPTS = {"pretrain", "sft", "rl", "mix", "sample", "eval"}
# of data/, the two of questions are parts of prepare.py; the other modules there are a library
PROGRAMS = {"prepare", "hf", "questions", "own_questions"}
# what a program takes from another one
PARTS = {
    "prepare": {"data.questions", "data.own_questions"},
    "own_questions": {"data.questions"},
}
OURS = SCRIPTS | {"model", "common", "plan", "data", "results"}
FILES = [path for folder in (ROOT, ROOT / "data") for path in sorted(folder.glob("*.py"))]
# what a stage takes from another one
BETWEEN = {"pretrain": {"eval"}, "sft": {"eval"}, "rl": {"eval"}, "mix": {"eval", "sft", "rl"}}


def imported(path) -> set[str]:
    """The modules that a file imports, inside functions too: torch, data.tokens, ..."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module if not node.level else f"data.{node.module or ''}".rstrip(".")
            packages = ("data", "results")
            names = [alias.name for alias in node.names]
            found |= {f"{module}.{name}" for name in names} if module in packages else {module}
    return found


def ours(path) -> set[str]:
    """Those of `imported` that are files of this project: model, data.tokens, ..."""
    return {name for name in imported(path) if name.split(".")[0] in OURS}


def allowed(path) -> set[str]:
    """First names of what a file may import of ours."""
    name = path.stem
    if path.parent.name == "data":
        return {"data", "common", "model"} if name in PROGRAMS else {"data"}
    if name == "model":
        return set()
    if name == "common":
        return {"data", "model", "plan"}
    if name == "plan":
        return {"data", "model"} | SCRIPTS
    more = {"results"} if name == "eval" else set()
    return {"data", "model", "common", "plan"} | BETWEEN.get(name, set()) | more


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_arrow(path):
    assert {name.split(".")[0] for name in ours(path)} <= allowed(path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_imports_a_program_of_data(path):
    programs = {f"data.{name}" for name in PROGRAMS}
    assert ours(path) & programs <= PARTS.get(path.stem, set())


def test_model_needs_nothing_but_torch():
    outside = {name.split(".")[0] for name in imported(ROOT / "model.py")}
    assert outside - set(sys.stdlib_module_names) <= {"torch", "triton"}


def test_no_cycle():
    """Also none through imports inside of functions, but for plan.py.

    It reads the Configs of the scripts, and common.py calls it for --plan.
    """
    arrows = {}
    for path in FILES:
        name = f"data.{path.stem}" if path.parent.name == "data" else path.stem
        arrows[name] = ours(path) - {"plan"}
    done = set()
    while ready := {name for name in arrows.keys() - done if arrows[name] & arrows.keys() <= done}:
        done |= ready
    assert done == arrows.keys(), {name: arrows[name] - done for name in arrows.keys() - done}


BLOCKED = "datasets math_verify zstandard matplotlib pandas scipy transformers pyarrow".split()
TRAINING_ALONE = f"""
import sys
for name in {BLOCKED}:
    sys.modules[name] = None  # importing it is an ImportError
import model, common, rl, pretrain, sft, mix, eval, sample
"""


def test_training_needs_only_torch_numpy_tiktoken_and_tqdm():
    """The rest of requirements.txt is for making data, for reports and for tests."""
    command = [sys.executable, "-c", TRAINING_ALONE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr

"""The arrows of the design: who may import whom."""

import ast
import sys

import pytest
from helpers import ROOT

SCRIPTS = {"pretrain", "sft", "rl", "mix", "sample", "eval"}
OURS = SCRIPTS | {"model", "data"}
BETWEEN_SCRIPTS = {"pretrain": {"eval"}, "sft": {"eval"}, "rl": {"eval"}, "mix": {"eval", "sft", "rl"}}
FILES = [*sorted(ROOT.glob("*.py")), *sorted((ROOT / "data").glob("*.py"))]


def imported(source: str) -> set[str]:
    """The first names of everything a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("data" if node.level else node.module.split(".")[0])
    return found


def allowed(path) -> set[str]:
    if path.name == "plan.py":  # prices the commands of matrix.sh by the scripts' own flags and sizes; nothing imports it
        return {"data"} | SCRIPTS
    if path.parent.name == "data":  # its programs may import what is at the top, its library may not
        return {"data", "model", "common"} if path.stem in ("prepare", "hf") else {"data"}
    return {"model": set()}.get(path.stem, {"model", "data"} | BETWEEN_SCRIPTS.get(path.stem, set()))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_arrow(path):
    """Seen to fail with `from rl import rl_batch` in sft.py and with `import model` in data/tasks.py."""
    assert imported(path.read_text()) & OURS <= allowed(path)


def test_model_needs_nothing_but_torch():
    outside = imported((ROOT / "model.py").read_text()) - set(sys.stdlib_module_names)
    assert outside <= {"torch", "triton"}

"""results/along.py by hand: where RL overtakes SFT, and 64 answers against 5."""

import numpy as np
import pytest

from results import along
from test_report import TOKENS, record, run_of

MODELS = range(4)


def watched(recipe, model, points, **more):
    """A row of validations; points: [(step, FLOPs until then, pass@1), ...]."""
    run = run_of(recipe, TOKENS[0], model, 0, **more) | {"kind": "curve", "split": "val"}
    names = ("step", "flops", "pass@1")
    return run | {"points": [dict(zip(names, point, strict=True)) for point in points]}


def cells(text):
    """The rows of the one table of a text."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines[2:]]


@pytest.mark.parametrize(
    "values, step",
    [
        ([-2.0, -1.0, 1.0, 2.0], 37.5),
        ([-2.0, 0.0, -1.0, 1.0], 25),
        ([1.0, -1.0, 1.0, 1.0], 0),
        ([-1.0, -1.0, -1.0, -0.1], np.inf),
    ],
)
def test_where_a_difference_is_no_longer_negative(values, step):
    assert along.crossing([0, 25, 50, 75], np.array(values)) == step


def test_where_rl_passes_sft():
    """rl is at 0, 20, 40%, sft at 30% with 50 FLOPs; on the last model rl stays behind."""
    rows = []
    for model in MODELS:
        far = 0.4 if model < 3 else 0.2
        rows.append(watched("rl", model, [(0, 0, 0.0), (100, 100, 0.2), (400, 400, far)]))
        rows.append(watched("sft", model, [(0, 0, 0.0), (9, 50, 0.3)]))
    (row,) = cells(along.overtaking(record(rows)))
    assert row[:3] == ["as usual", "1M", "400"]
    # means: -10 after 100 steps and +5 after 400
    assert row[3].startswith("300 (") and row[3].endswith(")")
    assert row[4] == "-20.0" and row[5].startswith("+5.0 ±") and row[6].startswith("+15.0 ±")


def test_the_range_of_a_crossing_is_that_of_models_drawn_again():
    steps = [0, 100, 200]
    alike = np.array([[-1.0] * 4, [0.0] * 4, [1.0] * 4])  # three steps of four models
    assert [*along.crossing_range(steps, alike)] == [100, 100]
    apart = alike.copy()
    apart[:, 3] = -5.0  # with it one of four is enough never to cross
    low, high = along.crossing_range(steps, apart)
    assert low == 100 and np.isinf(high)


def test_64_answers_against_5():
    """n=5 gains a point in 10 steps of 5 FLOPs, n=64 two in 10 steps of 64."""
    rows = []
    for model in MODELS:
        for group, end, gain in ((5, 600, 0.001), (64, 300, 0.002)):
            points = [(s, s * group, s * gain) for s in range(0, end + 1, 100)]
            row = watched("rl", model, points, group=group)
            ids = [f"{model}"]
            solved = dict(benchmark="easy", shots=0, n=1, correct=[1], ids=ids, formatted=1.0)
            rows += [row, row | {"kind": "pass", "split": "test"} | solved]
    found = {row[2]: row[3:] for row in cells(along.answers_compared(record(rows)))}
    few = "60.0"
    assert found["mean of the last 100 steps"] == [few, few, "+0.0"]
    assert found["as many steps and questions"] == ["30.0", few, "+30.0"]
    # 3,000 answers are 46.875 steps of 64
    assert found["as many answers"] == found["as many FLOPs"] == [few, "9.4", "-50.6"]


def test_without_such_rows_there_is_no_table():
    rows = [watched("rl", model, [(0, 0, 0.0), (9, 9, 0.1)]) for model in MODELS]
    assert along.overtaking(record(rows)) == along.answers_compared(record(rows)) == ""

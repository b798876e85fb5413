"""The paper's tables: statistics against plain loops and SciPy, and a table end to end on a tiny folder."""

import json
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import TINY, in_processes, make_folder
from run_folders import make_run
from scipy import stats

from report import paper
from report.runs import group_of, read_run
from utils.errors import UserError


def result(label: str, values: list[float], published=(None, None), base: str = "") -> paper.Result:
    by_seed = {"multimodal": dict(enumerate(values))}
    return paper.Result(paper.Row(label, "baseline", (), base, published), by_seed, {}, None, None, None, 1.0, 1.0)


def test_holm_is_the_step_down_procedure() -> None:
    """Smallest first: k hypotheses are rejected at level a if their adjusted values are at most a."""
    p = [0.01, 0.04, 0.03, 0.005, 0.2]
    adjusted = paper.holm(p)
    for level in np.linspace(0.001, 0.999, 400):
        rejected, order = set(), sorted(range(5), key=lambda i: p[i])
        for rank, i in enumerate(order):
            if p[i] > level / (5 - rank):
                break
            rejected.add(i)
        assert {i for i in range(5) if adjusted[i] <= level} == rejected
    assert paper.holm([]) == [] and paper.holm([0.7, 0.8]) == [1.0, 1.0]


def test_p_values_are_scipys() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=5), rng.normal(size=5)
    found = paper.p_value(dict(enumerate(ours)), dict(enumerate(theirs)) | {9: 1.0})
    assert found == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)
    assert paper.p_value({0: 1.0}, {0: 0.5}) is None and paper.p_value({}, {}) is None


def test_the_mean_gain_averages_heads_within_each_seed() -> None:
    results = [
        result("A", [0.5, 0.6]),
        result("A + Remix", [0.6, 0.8]),
        result("B", [0.4, 0.4]),
        result("B + Remix", [0.3, 0.6]),
    ]
    found = paper.mean_gain(results, [("A", "A + Remix"), ("B", "B + Remix")])
    assert found.mean == pytest.approx(np.mean([(0.1 - 0.1) / 2, (0.2 + 0.2) / 2])) and found.n == 2
    assert paper.mean_gain(results, [("A", "C")]) is None


def test_seconds_are_the_median_over_seeds(tmp_path) -> None:
    """One run that other jobs slowed down does not count; scoring, training and evaluation do."""
    runs = {seed: read_run(make_run(tmp_path, "baseline", seed, [0.5, 0.6])) for seed in range(3)}  # 60 s each
    for run, train in zip(runs.values(), (500.0, 8.0, 28.0), strict=True):
        run.config["data"]["clips"] = {"train": 10}
        for line in run.history:
            line |= {"n_fed": 10, "seconds_train": train}
    (found,) = paper.results_of([paper.CONCAT], {"Concat": group_of("Concat", runs)})
    assert found.seconds == 60.0


def test_the_order_of_rows_is_compared_pair_by_pair() -> None:
    rows = [result("x", [0.9, 0.91, 0.92], (70.0, None)), result("y", [0.5, 0.51, 0.52], (60.0, None)),
            result("z", [0.1, 0.6, 0.98], (65.0, 1.0))]  # fmt: skip
    # x > y is right and clear; the paper has x > z > y; z's mean is 0.56, between them: all three pairs are right
    assert paper.ordering(rows, 0) == ("Of the 3 pairs of rows, 3 are in the paper's order on CREMAD; of the 1 pairs "
                                       "whose 95 % interval excludes 0, 1.")  # fmt: skip
    swapped = [rows[0]._replace(row=rows[0].row._replace(published=(50.0, None))), *rows[1:]]
    assert "3 pairs of rows, 1 are" in paper.ordering(swapped, 0) and "excludes 0, 0." in paper.ordering(swapped, 0)
    assert paper.ordering(rows, 1) == ""


def test_published_numbers_give_the_abstracts_gains() -> None:
    """Mean gain over Concat, Sum and Decision: 6.50 points on CREMA-D and 3.41 on Kinetics-Sounds."""
    rows = {row.label: row.published for row in paper.TABLES["table1"].rows}
    for column, gain in enumerate((6.50, 3.41)):
        gains = [rows[f"{head} + Remix"][column] - rows[head][column] for head in ("Concat", "Sum", "Decision")]
        assert np.mean(gains) == pytest.approx(gain, abs=0.005)


@pytest.mark.parametrize(("what", "dataset"), product(paper.TABLES, ("demo", "CREMAD")))
def test_every_row_is_a_command_that_train_accepts(what, dataset) -> None:
    args, rest = paper.parse_args([what, "--dataset", dataset])
    plan = paper.make_plan(args, rest)
    assert set(plan[what]) == {row.label for row in paper.TABLES[what].rows}
    for row in paper.TABLES[what].rows:
        assert not row.base or row.base in plan[what]
    if dataset == "CREMAD":
        assert all(run.flags["learning_rate"] == 5e-5 for runs in plan[what].values() for run in runs.values())


def test_tables_share_their_runs() -> None:
    args, rest = paper.parse_args(["table1", "table5", "--seeds", "0"])
    plan = paper.make_plan(args, rest)
    assert plan["table1"]["Concat"][0] == plan["table5"]["neither"][0]
    names = [run.name for run in paper.in_order(plan)]
    assert len(names) == len(set(names)) == 8 + 2


@pytest.mark.parametrize(("words", "said"), [
    (["table9"], "table9: unknown"), ([], "nothing to do"), (["--seeds", "0"], "nothing to do"),
    (["table1", "--seeds", "0,x"], "--seeds 0,x"), (["table1", "--seeds", "1,1"], "--seeds 1,1"),
])  # fmt: skip
def test_mistakes_are_one_line(words, said) -> None:
    with pytest.raises(UserError, match=said):
        args, rest = paper.parse_args(words)
        paper.make_plan(args, rest)


def test_fed_per_clip_counts_the_epochs_after_the_warm_up() -> None:
    history = [{"epoch": 0, "n_fed": 10}, {"epoch": 1, "n_fed": 19}, {"epoch": 2, "n_fed": 17}]
    run = SimpleNamespace(history=history, config={"warmup": 1, "data": {"clips": {"train": 10}}})
    assert paper.fed_per_clip(SimpleNamespace(runs={0: run})) == pytest.approx(1.8)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("paper")
    data = make_folder(root / "data")
    words = [*TINY, "--data_root", str(data), "--epochs", "2", "--warmup", "1", "--device", "cpu"]
    command = ["table5", "figure3", "--seeds", "0", "--jobs", "2", "--log_path", str(root / "runs"), *words]
    (((status,), out, err),) = in_processes(root / "said", ["tests/paper_runs.py", *command], alone=True)
    assert status == 0, out + err
    return root, command


def test_a_table_and_the_figure_are_made_from_their_runs(made) -> None:
    root, _ = made
    found = json.loads((root / "runs" / "table5.json").read_text())
    rows = {row["label"]: row for row in found["rows"]}
    assert list(rows) == ["neither", "decouple only", "reassemble only", "both (Remix)"]
    assert rows["both (Remix)"]["flags"] == {} and rows["decouple only"]["flags"] == {"reassemble": "off"}
    for row in rows.values():
        for seed, value in row["by_seed"]["multimodal"].items():
            flags = "".join(f"_{k}-{v}" for k, v in row["flags"].items())
            folder = next((root / "runs").glob(f"folder*_{row['method']}{flags}_seed{seed}"))
            last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
            assert value == last["test_acc"]
    both, neither = (rows[label]["by_seed"]["multimodal"]["0"] for label in ("both (Remix)", "neither"))
    assert rows["both (Remix)"]["difference"]["mean"] == pytest.approx(both - neither)
    page = (root / "runs" / "paper.md").read_text()
    assert "## Table 5" in page and "## Figure 3" in page and "4 runs on `folder`" in page
    assert (root / "runs" / "paper-figure3.png").stat().st_size > 10_000


def test_the_same_command_trains_nothing_again(made, capsys) -> None:
    root, command = made
    before = {path: path.stat().st_mtime_ns for path in (root / "runs").glob("*/last.pth")}
    assert paper.main(command) == 0
    assert "4 runs in" in (out := capsys.readouterr().out) and "0 to start, 0 to resume, 4 finished already" in out
    assert before == {path: path.stat().st_mtime_ns for path in (root / "runs").glob("*/last.pth")}

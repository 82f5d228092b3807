"""What the benchmark of precision says is so: errors it has been given are the errors it finds."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedpo.benchmarks import precision, reports
from fusedpo.benchmarks.options import Options
from fusedpo.benchmarks.peers import PEERS, Peer, full_logits
from fusedpo.benchmarks.shapes import Case, Inputs, Shape

SMALL = Shape(pairs=3, tokens=16, hidden=32, vocab=600)
NEEDS = "torch.nn.functional.linear"


def rounded_logits(case: Case, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities from logits that were rounded to bf16, whatever the dtype."""
    logits = F.linear(hidden, weight).bfloat16().float()
    return logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]


def nine_tenths(case: Case, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The right values with 0.9 of their gradient."""
    exact = full_logits(case, hidden.double(), weight.double(), labels)
    return 0.9 * exact + 0.1 * exact.detach()


def broken(case: Case, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    raise RuntimeError("no such kernel\nand more")


def of_the_batch(case: Case, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Different in every batch, by a thousandth for each response that is in it."""
    return full_logits(case, hidden, weight, labels) + 1e-3 * len(labels)


def infinite(case: Case, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return full_logits(case, hidden, weight, labels) * math.inf


def ask(monkeypatch: pytest.MonkeyPatch, *names: str, **options: object) -> dict:
    for function in (rounded_logits, nine_tenths, of_the_batch, broken, infinite):
        name = function.__name__
        monkeypatch.setitem(PEERS, name, Peer(name, "torch", NEEDS, function))
    given = Options(quick=True, shapes=(SMALL,), peers=names, threads=1)
    return precision.QUESTION.ask(replace(given, **options))


def values(answer: dict, group: str, entry: str) -> dict[str, float | None]:
    (found,) = [r for r in answer["rows"] if (r["group"], r["entry"]) == (group, entry)]
    return found["values"]


@pytest.fixture(scope="module")
def usual() -> dict:
    with pytest.MonkeyPatch.context() as patch:
        return ask(patch, "full_logits", "fusedpo")


def test_every_error_is_there_in_every_dtype(usual: dict) -> None:
    answer = usual
    assert json.loads(json.dumps(answer, allow_nan=False)) == answer
    wanted = {"question", "title", "machine", "quick", "rows", "kind"}
    assert wanted <= set(answer) and answer["kind"] == answer["question"] == "precision"
    for group in ("bf16", "fp16", "fp32"):
        for entry in ("full logits", "fusedpo", "fusedpo, 8 MiB"):
            assert all(v is not None and v >= 0 for v in values(answer, group, entry).values())
    assert values(answer, "fp32", "full logits")["weight"] < 1e-5
    assert values(answer, "bf16", "full logits")["logp_max"] > 1e-3
    columns, lines = precision.table(answer)
    assert len(lines) == 12 and {len(line) for line in lines} == {len(columns)}


def test_ours_is_exact(usual: dict) -> None:
    answer = usual
    for group in ("bf16", "fp16", "fp32"):
        for entry in ("fusedpo", "fusedpo, 8 MiB"):
            ours = values(answer, group, entry)
            # log-probabilities as in fp32 in every dtype
            assert ours["logp_max"] < 1e-5 and ours["logp_rms"] < 4e-6
            # 0 where the machine's products treat a row alike among 16 rows and among 96
            assert ours["ratio"] < 1e-5
            assert ours["step_0"] == 0
            if group != "fp32":
                floor = values(answer, group, precision.FLOOR)
                # a gradient may be rounded twice: that of a row, and that times a coefficient
                assert ours["hidden"] < 1.6 * floor["hidden"]
                assert ours["weight"] < 1.6 * floor["weight"]
    for group in ("bf16", "fp16"):
        ranks = precision.ranking(answer)[group]
        for key in ("logp_max", "hidden", "weight"):
            assert ranks[key]["fusedpo"] and "full logits" not in ranks[key]["first"]


def test_a_worse_program_ranks_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = ask(monkeypatch, "full_logits", "rounded_logits", "fusedpo", dtype="float32")
    ranks = precision.ranking(answer)["fp32"]
    for key in ("logp_max", "logp_rms", "hidden", "weight"):
        assert ranks[key]["order"][-1] == "rounded_logits"
        assert "rounded_logits" not in ranks[key]["first"]
    columns, lines = precision.table(answer)
    (line,) = [line for line in lines if line[1] == "rounded_logits"]
    assert not line[columns.index("logp, max")].endswith("*")
    # the loss at step 0 is of the same numbers twice, however they were rounded
    assert line[columns.index("loss at step 0")] == "0*"


def test_a_gradient_of_nine_tenths_is_a_tenth_off(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = ask(monkeypatch, "nine_tenths", "fusedpo", dtype="float32")
    found = values(answer, "fp32", "nine_tenths")
    for key in ("hidden", "hidden_row", "weight"):
        assert found[key] == pytest.approx(0.1, rel=1e-3)
    assert found["logp_max"] < 1e-9
    ranks = precision.ranking(answer)["fp32"]
    assert ranks["weight"]["order"][-1] == "nine_tenths"
    # better than ours where it is exact, and said to be
    assert ranks["logp_max"]["order"][0] == "nine_tenths" and not ranks["logp_max"]["fusedpo"]


def test_what_depends_on_the_batch_is_noise_on_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = ask(monkeypatch, "full_logits", "of_the_batch", "fusedpo", dtype="float32")
    found = values(answer, "fp32", "of_the_batch")
    # six responses in a step, and one at a time before it
    assert found["ratio"] == pytest.approx(5e-3, rel=0.01)
    assert precision.ranking(answer)["fp32"]["ratio"]["order"][-1] == "of_the_batch"


def test_what_fails_says_why_and_ranks_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = ask(monkeypatch, "broken", "infinite", "liger_scaled", "fusedpo", dtype="float32")
    rows = {row["entry"]: row for row in answer["rows"]}
    assert rows["broken"]["missing"] == "RuntimeError: no such kernel"
    assert rows["Liger scaled cross-entropy"]["missing"]
    assert rows["infinite"]["missing"] and "is not finite" in rows["infinite"]["missing"]
    for rank in precision.ranking(answer)["fp32"].values():
        assert {name.split(",")[0] for name in rank["order"]} == {"fusedpo"} and rank["fusedpo"]
    assert {line[1] for line in precision.table(answer)[1]} == {
        precision.FLOOR,
        "fusedpo",
        "fusedpo, 8 MiB",
    }


def test_ties_and_zeros() -> None:
    def row(entry: str, value: float | None) -> dict:
        case = {"peer": "fusedpo" if entry == "fusedpo" else "other"}
        filled = {column.key: value for column in precision.COLUMNS}
        return {"group": "fp32", "entry": entry, "case": case, "values": filled}

    def first(ours: float | None, other: float) -> bool:
        rows = [row("a", other), row("b", None), row("fusedpo", ours)]
        return precision.ranking({"rows": rows})["fp32"]["hidden"]["fusedpo"]

    assert first(1.0, 2.0) and first(1.04, 1.0) and first(0.0, 0.0) and first(0.0, 1.0)
    assert not first(1.06, 1.0) and not first(1e-9, 0.0) and not first(None, 1.0)


def test_flushed_is_the_share_that_should_not_be_zero() -> None:
    exact = torch.ones(4, 10, dtype=torch.float64)
    exact[0] = 0
    truth = precision.Truth(torch.zeros(1, 2), torch.ones(1, 2, 10, dtype=torch.float64), exact)
    got = torch.ones(4, 10)
    got[:2] = 0
    found = precision.gradient_errors(truth.hidden, got, truth)
    assert found["flushed"] == 0.25 and found["hidden"] == 0
    assert found["weight"] == pytest.approx((10 / 30) ** 0.5)
    nothing = precision.gradient_errors(None, None, truth)
    assert nothing["hidden"] == nothing["hidden_row"] == nothing["weight"] == 1


@pytest.mark.parametrize("loss", ["dpo", "simpo", "orpo", "kto", "sspo"])
def test_the_truth_in_pieces_is_that_of_the_whole(
    loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusedpo.benchmarks.peers import by_formula

    reference = "same call" if loss in ("dpo", "kto") else "none"
    case = Case("full_logits", SMALL, "bfloat16", loss=loss, reference=reference)
    inputs = precision.realistic_inputs(case).for_case(case)
    monkeypatch.setattr(precision, "_TRUTH_ELEMENTS", 7 * SMALL.vocab)
    truth = precision.truth_of(case, inputs)
    floats = [x.double() if x is not None and x.is_floating_point() else x for x in inputs]
    whole = Inputs(*floats).for_case(case)
    by_formula(full_logits, case, whole).backward()
    assert (truth.hidden - whole.hidden.grad).norm() <= 1e-10 * whole.hidden.grad.norm()
    assert (truth.weight - whole.weight.grad).norm() <= 1e-10 * whole.weight.grad.norm()


def test_inputs_are_like_those_of_a_trained_model() -> None:
    case = Case("full_logits", Shape(8, 64, 128, 8192), "bfloat16")
    inputs = precision.realistic_inputs(case)
    assert inputs.hidden.dtype == inputs.weight.dtype == torch.bfloat16
    logits = F.linear(inputs.hidden.double(), inputs.weight.double())
    own = logits.gather(-1, inputs.labels[..., None])[..., 0]
    others = logits.scatter(-1, inputs.labels[..., None], -math.inf).amax(-1)
    gaps = own - others
    assert 2 < logits.std(-1).median() < 4
    assert 0.15 < (gaps > 4).double().mean() < 0.35 and gaps.max() > 20 and gaps.min() < -5


def test_the_plot_names_every_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    answer = ask(monkeypatch, "full_logits", "broken", "fusedpo", dtype="float16")
    figure = precision.plot(answer)
    assert len(figure.axes) == len(precision.COLUMNS)
    names = figure.axes[0].get_yticklabels()
    assert [n.get_text() for n in names] == [
        precision.FLOOR,
        "full logits",
        "fusedpo",
        "fusedpo, 8 MiB",
    ]
    assert (
        len({n.get_color() for n in names[2:]}) == 1
        and names[1].get_color() != names[2].get_color()
    )
    assert "0" in [t.get_text() for t in figure.axes[7].texts]
    figure.savefig(tmp_path / "plot.png")


def test_the_command_writes_the_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    arguments = ["--quick", "--shapes", "16,16,300", "--peers", "fusedpo", "--dtype", "bfloat16"]
    arguments += ["--losses", "dpo", "simpo"]
    arguments += ["--threads", str(threads), "--output", str(tmp_path)]
    assert reports.main(precision.QUESTION, arguments) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("fusedpo, 8 MiB", "bf16, DPO", "bf16, SimPO"))
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["precision"]["losses"] == ["dpo", "simpo"]

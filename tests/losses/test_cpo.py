"""CPO: worked numbers for each link, and the losses that it is without a reference."""

from __future__ import annotations

import pytest
import torch
from losses import formulas as f
from losses.problems import scores_of
from losses.shared import scores

from fusedpo.engine.structure import GradientStructure
from fusedpo.losses import CPO, DPO
from fusedpo.losses.scores import Scores


def exact(
    pairs: list[f.Pair],
    beta: float = 0.1,
    nll_weight: float = 1.0,
    link: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> f.PairResult:
    """DPO's loss or the hinge of z = beta (lp_w - lp_l), or IPO's of averages, plus SFT"""

    def rule(lp_w, lp_l):
        value, c = f.linked(link, label_smoothing, beta * (lp_w - lp_l))
        return value, -beta * c, beta * c

    def ipo(mean_w, mean_l):
        u = mean_w - mean_l - 1 / (2 * beta)
        return u**2, 2 * u, -2 * u

    if link == "ipo":
        preference = f.of_log_probs(pairs, ipo, average=True)
    else:
        preference = f.of_log_probs(pairs, rule, average=False)
    return f.add(preference, f.cross_entropy(pairs, nll_weight))


EXACT = {
    CPO: (
        exact,
        [
            {},
            {"nll_weight": 0.0, "label_smoothing": 0.2},
            {"link": "hinge", "nll_weight": 0.4},
            {"link": "ipo", "beta": 0.3},
        ],
    ),
}

DEFAULTS = [
    "CPO(beta=0.1, nll_weight=1.0, link='sigmoid', label_smoothing=0.0)",
]


@pytest.mark.holds(33)
@pytest.mark.parametrize(
    "link, truth", [("sigmoid", 0.31326168751822286), ("hinge", 0.0), ("ipo", 2.25)]
)
def test_a_worked_example(link: str, truth: float) -> None:
    """Log-probabilities -8 and -10, beta 0.5: z = 1, so log(1 + exp(-1)) = 0.3132617 and
    max(0, 1 - 1) = 0. Averages -2 and -2.5 over 4 tokens: (0.5 - 1)^2 = 0.25; over 4 and 2 tokens,
    -2 and -4.5: (2.5 - 1)^2 = 2.25."""
    length = [2] if link == "ipo" else [4]
    lower = -9.0 if link == "ipo" else -10.0
    chosen, rejected = scores_of([-8.0], length=[4]), scores_of([lower], length=length)
    found = CPO(beta=0.5, link=link).per_example(chosen, rejected).item()
    assert found == pytest.approx(truth, rel=1e-12)


def test_it_is_dpo_against_a_uniform_reference() -> None:
    """...of any likelihood that is the same for both responses."""
    w, l = scores(0, reference=False)
    same = torch.zeros_like(w.logp)
    truth = DPO(0.3, 0.1).per_example(
        Scores(w.logp, w.length, same), Scores(l.logp, l.length, same)
    )
    assert torch.equal(CPO(0.3, label_smoothing=0.1).per_example(w, l), truth)


def test_the_cross_entropy_is_no_part_of_the_pair_loss() -> None:
    assert CPO().nll_weight == 1.0 and CPO().gradient_structure == GradientStructure("pair", 2)
    assert CPO(nll_weight=0.0).gradient_structure.unit == "margin"


@pytest.mark.parametrize(
    "options, named",
    [
        ({"beta": 0.0}, "beta"),
        ({"nll_weight": -1.0}, "nll_weight"),
        ({"link": "ip"}, "ipo"),
        ({"link": "hinge", "label_smoothing": 0.1}, "label_smoothing"),
    ],
)
def test_bad_hyperparameters_are_refused(options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        CPO(**options)

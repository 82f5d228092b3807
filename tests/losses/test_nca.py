"""NCA: worked numbers, and that it holds the chosen response's own likelihood."""

from __future__ import annotations

import pytest
import torch
from losses import formulas as f
from losses.problems import scores_of

from fusedpo.losses import BCO, NCA


def exact(pairs: list[f.Pair], beta: float = 0.01, **modifiers) -> f.PairResult:
    """-log sigma(r_w) - 1/2 log sigma(-r_w) - 1/2 log sigma(-r_l),  r = beta a"""

    def rule(a_w, a_l):
        r_w, r_l = beta * a_w, beta * a_l
        value = -f.logsig(r_w) - f.logsig(-r_w) / 2 - f.logsig(-r_l) / 2
        return value, -beta * f.sigma(-r_w) + beta / 2 * f.sigma(r_w), beta / 2 * f.sigma(r_l)

    return f.of_log_ratios(pairs, rule, **modifiers)


EXACT = {
    NCA: (exact, [{}, {"beta": 0.5}]),
}

DEFAULTS = [
    "NCA(beta=0.01)",
]


@pytest.mark.holds(33)
def test_a_worked_example() -> None:
    """Log-ratios 2 and -1, beta 0.5: r = 1 and -0.5, L = log(1 + exp(-1)) + log(1 + exp(1)) / 2 +
    log(1 + exp(-0.5)) / 2 = 0.3132617 + 0.6566308 + 0.2370385 = 1.2069310."""
    chosen, rejected = scores_of([-8.0], [-10.0]), scores_of([-6.0], [-5.0])
    found = NCA(beta=0.5).per_example(chosen, rejected).item()
    assert found == pytest.approx(1.2069310233673876, rel=1e-12)


def test_the_chosen_responses_optimum_is_finite() -> None:
    """-sigmoid(-r) + sigmoid(r) / 2 is 0 at sigmoid(r) = 2/3: at r = log 2."""
    log_two = float(torch.tensor(2.0, dtype=torch.float64).log())
    for r, sign in ((log_two - 0.1, -1), (log_two + 0.1, 1)):
        chosen, rejected = scores_of([r], [0.0]), scores_of([0.0], [0.0])
        (slope,) = torch.autograd.grad(NCA(1.0).per_example(chosen, rejected).sum(), chosen.logp)
        assert slope.item() * sign > 0


def test_it_is_bco_and_its_mirror() -> None:
    """Twice its rejected part is BCO's; twice its chosen part is BCO's and that of both signs."""
    s, mirrored = scores_of([-8.0], [-10.0]), scores_of([-12.0], [-10.0])
    nca, bco = NCA(0.5), BCO(0.5)
    assert 2 * nca.of_response("rejected", s) == bco.of_response("rejected", s)
    both = bco.of_response("chosen", s) + bco.of_response("chosen", mirrored) / 2
    assert nca.of_response("chosen", s).item() == pytest.approx(both.item(), rel=1e-14)


@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan")])
def test_bad_hyperparameters_are_refused(beta: float) -> None:
    with pytest.raises(ValueError, match="beta"):
        NCA(beta=beta)

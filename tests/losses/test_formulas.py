"""Every loss, modifier and option against its formula: value and gradient of every token."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses import exact as f
from losses.problems import (
    Found,
    faults,
    inputs_of,
    of_responses,
    of_samples,
    policy_faults,
    preference_faults,
    roles_of,
    true_of_pairs,
)
from losses.shared import made

from fusedpo import losses as L
from fusedpo.losses.gates import GATES

PAIRS: dict[str, tuple[L.PreferenceLoss, Callable]] = {}
SAMPLES: dict[str, tuple[L.PolicyLoss, Callable]] = {}


def _add(table: dict, cls: type, **options) -> None:
    """A loss with the same options here and there; without any, with the same defaults."""
    name = " ".join([cls.__name__, *(f"{k}={v}" for k, v in options.items())])
    table[name] = (cls(**options), functools.partial(getattr(f, cls.__name__), **options))


for _cls, (_, _settings) in f.EXACT.items():
    if issubclass(_cls, L.PreferenceLoss):
        for _options in _settings:
            _add(PAIRS, _cls, **_options)

# what is spelt otherwise there: defaults by themselves, modifiers, sums
PAIRS |= {
    "SemanticSPPO": (L.SemanticSPPO(repulsion="none"), f.SemanticSPPO),
    "SemanticSPPO scaled": (
        L.SemanticSPPO(0.3, True, repulsion="none"),
        functools.partial(f.SemanticSPPO, beta=0.3, scaled=True),
    ),
    "SemanticSPPO baseline": (
        L.SemanticSPPO(0.3, baseline=0.7, repulsion="none"),
        functools.partial(f.SemanticSPPO, beta=0.3, baseline=0.7),
    ),
    "ShortToLong": (L.ShortToLong(), functools.partial(f.ShortToLong, base="SimPO")),
    "WPO IPO": (L.WPO(L.IPO()), functools.partial(f.WPO, f.IPO)),
    "WPO DPO": (L.WPO(L.DPO(beta=0.5)), functools.partial(f.WPO, f.DPO, beta=0.5)),
    "WPO SimPO": (L.WPO(L.SimPO()), functools.partial(f.WPO, f.SimPO)),
    "WPO BCO": (L.WPO(L.BCO(beta=0.5)), functools.partial(f.WPO, f.BCO, beta=0.5)),
    "WPO FDivergence": (
        L.WPO(L.FDivergence(L.IPO(), "js_divergence")),
        functools.partial(f.WPO, f.IPO, divergence="js"),
    ),
    "LengthDesensitized FDivergence": (
        L.LengthDesensitized(
            L.FDivergence(L.IPO(average=False), "alpha_divergence", alpha=0.2), 0.6
        ),
        functools.partial(
            f.IPO, average=False, divergence="alpha", divergence_alpha=0.2, ld_alpha=0.6
        ),
    ),
    "Mixture": (
        0.8 * L.DPO() + 0.2 * L.BCO(beta=0.5) + 1.0 * L.SFT(),
        lambda pairs: f.add(
            _times(0.8, f.DPO(pairs)), _times(0.2, f.BCO(pairs, beta=0.5)), f.SFT(pairs)
        ),
    ),
    "Mixture of a mixture": (
        0.5 * (L.CPO(nll_weight=0.3) + 2.0 * L.SPPO(beta=0.2)) + L.AOT(beta=0.3),
        lambda pairs: f.add(
            _times(0.5, f.CPO(pairs, nll_weight=0.3)), f.SPPO(pairs, 0.2), f.AOT(pairs, 0.3)
        ),
    ),
    "Mixture of modified losses": (
        0.5 * L.WPO(L.DPO(beta=0.5)) + L.FDivergence(L.IPO(), "js_divergence") + 0.3 * L.SFT(),
        lambda pairs: f.add(
            _times(0.5, f.WPO(f.DPO, pairs, beta=0.5)),
            f.IPO(pairs, divergence="js"),
            f.SFT(pairs, 0.3),
        ),
    ),
    "LengthDesensitized mixture": (
        L.LengthDesensitized(0.5 * L.DPO() + L.IPO(), 0.2),
        lambda pairs: f.add(_times(0.5, f.DPO(pairs, ld_alpha=0.2)), f.IPO(pairs, ld_alpha=0.2)),
    ),
    "sppo_hard": (
        L.get("sppo_hard", beta=0.2),
        lambda pairs: _times(2.0, f.SPPO(pairs, beta=0.2)),
    ),
}
for _loss, _truth in [
    (L.DPO(beta=0.5), functools.partial(f.DPO, beta=0.5)),
    (L.DPO(2.0, 0.1, True), functools.partial(f.DPO, beta=2.0, label_smoothing=0.1)),
    (L.IPO(), f.IPO),
    (L.NCA(beta=0.4), functools.partial(f.NCA, beta=0.4)),
    (L.BCO(beta=0.4), functools.partial(f.BCO, beta=0.4)),
    (L.APODown(), f.APODown),
    (L.EXO(), f.EXO),
    (L.DiscoPOP(), f.DiscoPOP),
]:
    if getattr(_loss, "length_normalized", False):
        _truth = functools.partial(_truth, length_normalized=True)
    for _name, _there in [
        ("reverse_kl", "reverse_kl"),
        ("forward_kl", "forward_kl"),
        ("js_divergence", "js"),
        ("alpha_divergence", "alpha"),
    ]:
        PAIRS[f"FDivergence {_name} {_loss}"] = (
            L.FDivergence(_loss, _name),
            functools.partial(_truth, divergence=_there),
        )
    PAIRS[f"LengthDesensitized {_loss}"] = (
        L.LengthDesensitized(_loss, 0.3),
        functools.partial(_truth, ld_alpha=0.3),
    )
for _base in (L.DPO(), L.SimPO(), L.ORPO()):
    for _options in (
        {"distance": "abs", "both": True},
        {"distance": "sq", "alpha": 0.7},
        {"distance": "huber", "both": True, "kappa": 0.3},
        {"detach_short": True, "both": True},
    ):
        PAIRS[f"ShortToLong {_base} {_options}"] = (
            L.ShortToLong(_base, **_options),
            functools.partial(f.ShortToLong, base=type(_base).__name__, **_options),
        )
for _base, _hyper in (
    (L.IPO(), {}),
    (L.IPO(0.4, average=False), {"beta": 0.4, "average": False}),
    (L.SimPO(), {}),
):
    for _options in (
        {"distance": "quadratic", "both": True, "scale": 0.3},
        {"distance": "quadratic", "detach_short": True, "alpha": 1.7},
    ):
        PAIRS[f"ShortToLong {_base} {_options}"] = (
            L.ShortToLong(_base, **_options),
            functools.partial(f.ShortToLong, base=type(_base).__name__, **_options, **_hyper),
        )
PAIRS["ShortToLong of rewards over IPO"] = (
    L.ShortToLong(L.IPO(), distance="sq", alpha=0.7),
    functools.partial(f.ShortToLong, base="IPO", distance="sq", alpha=0.7),
)


def _times(weight: float, result: f.PairResult) -> f.PairResult:
    value, gradients = result
    return weight * value, [{role: weight * g for role, g in own.items()} for own in gradients]


KTO = {
    f"{variant} {options}": {"variant": variant, **options}
    for variant in ("kto", "apo_zero")
    for options in ({}, {"beta": 0.6, "desirable_weight": 1.3, "undesirable_weight": 0.7})
}

_SETTINGS = [
    *((cls, each) for cls, (_, settings) in f.EXACT.items() for each in settings),
    *((L.SoftSequence, {"gate": gate}) for gate in GATES if gate != "clip_log"),
]
for _cls, _options in _SETTINGS:
    if not issubclass(_cls, L.PolicyLoss):
        continue
    _add(SAMPLES, _cls, **_options)
    if set(_options) <= {"gate"}:
        for _estimator in ("k1", "k2", "k3", "k3_corrected"):
            _add(SAMPLES, _cls, **_options, kl_weight=0.3, kl_estimator=_estimator)
SAMPLES["SoftSequence"] = (L.SoftSequence(), f.SoftSequence)
SAMPLES["SoftSequence clip_log"] = (
    L.SoftSequence(gate="clip_log", tau_pos=0.3, tau_neg=0.3),
    functools.partial(f.SoftSequence, gate="clip_log", epsilon=0.3),
)

# GSPO's and LUSPO's further options, which the formulas of whole responses do not have, are GRPO's
# on one token: test_gspo


def paths(table: dict) -> pytest.MarkDecorator:
    """Each loss by its formula in PyTorch and, if it has a tail, by the tail's kernel."""

    def has_kernel(loss: L.Loss) -> bool:
        return loss.tail is not None and not getattr(loss, "kl_weight", 0)

    cases = [
        pytest.param(name, backend, id=f"{name}-{backend}")
        for name, (loss, _) in table.items()
        for backend in ("torch", "triton")
        if backend == "torch" or has_kernel(loss)
    ]
    return pytest.mark.parametrize("name, backend", cases)


def on_both_backends(names: Iterable[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "name, backend", [(name, b) for name in names for b in ("torch", "triton")]
    )


seeds = given(seed=st.integers(0, 100_000), count=st.integers(1, 5))


def groups_of(seed: int, count: int, **options) -> list[f.Sample]:
    return f.random_samples(np.random.default_rng(seed), count, **options)


def test_every_loss_is_compared() -> None:
    known = {type(loss) for loss, _ in [*PAIRS.values(), *SAMPLES.values()]} | {L.KTO}
    assert known >= {*L.available().values(), L.FDivergence, L.WPO, L.LengthDesensitized, L.Mixture}


@pytest.mark.holds(33)
@paths(PAIRS)
@settings(max_examples=8)
@seeds
def test_pairs(name: str, backend: str, seed: int, count: int) -> None:
    loss, truth = PAIRS[name]
    pairs = f.random_pairs(np.random.default_rng(seed), count, long=True)
    got = of_responses(
        loss, roles_of(loss, pairs), inputs_of(loss, pairs), kernel=backend == "triton"
    )
    assert not faults(got, true_of_pairs(loss, truth(pairs)))


@pytest.mark.holds(33)
@pytest.mark.parametrize("name", KTO)
@settings(max_examples=10)
@given(
    seed=st.integers(0, 100_000),
    desirable=st.lists(st.booleans(), min_size=1, max_size=6),
    kl=st.floats(-1, 1),
)
def test_kto(name: str, seed: int, desirable: list[bool], kl: float) -> None:
    loss = L.KTO(**KTO[name])
    rng = np.random.default_rng(seed)
    examples = [f.random_response(rng) for _ in desirable]
    inputs = {"desirable": torch.tensor(desirable)}
    if "kl" in loss.inputs:
        inputs["kl"] = torch.tensor(kl, dtype=torch.float64)
    got = of_responses(loss, {"response": examples}, inputs)
    assert not faults(got, Found(*f.KTO(examples, desirable, kl=kl, **KTO[name])))


@pytest.mark.holds(33)
@paths(SAMPLES)
@settings(max_examples=5)
@seeds
def test_groups(name: str, backend: str, seed: int, count: int) -> None:
    loss, truth = SAMPLES[name]
    for old in (True, False):
        samples = groups_of(seed, count, old=old, reference=True)
        got = of_samples(loss, samples, kernel=backend == "triton")
        assert not faults(got, Found(*truth(samples)))


@pytest.mark.holds(33)
@paths(SAMPLES)
@settings(max_examples=5)
@seeds
def test_groups_with_importance_weights(name: str, backend: str, seed: int, count: int) -> None:
    loss, truth = SAMPLES[name]
    samples = groups_of(seed, count, reference=True, weighted=True)
    if isinstance(loss, L.VESPO):
        truth = functools.partial(truth, fold_weight=True)
    got = of_samples(loss, samples, kernel=backend == "triton")
    assert not faults(got, Found(*truth(samples)))


OF_TOKENS = [n for n, (loss, _) in SAMPLES.items() if loss.formula_structure.scope == "token"]


@pytest.mark.holds(33)
@pytest.mark.parametrize("name", OF_TOKENS)
@settings(max_examples=5)
@seeds
def test_tokens_with_weights_and_advantages_of_their_own(name: str, seed: int, count: int) -> None:
    loss, truth = SAMPLES[name]
    samples = groups_of(seed, count, reference=True, weighted=True, per_token=True)
    assert not faults(of_samples(loss, samples), Found(*truth(samples)))


# from hidden states

FROM_HIDDEN = {
    name: case
    for name, case in PAIRS.items()
    if not name.startswith("FDivergence") or "DPO(beta=0.5" in name
} | {
    f"SemanticSPPO {form}": (
        # scaled, with a target near the responses': neither of the two terms hides the other
        made(
            L.SemanticSPPO,
            beta=0.5,
            scaled=True,
            repulsion_weight=0.3,
            repulsion=form,
            margin=5.0,
            kappa=3.0,
        ),
        functools.partial(f.SemanticSPPO, beta=0.5, scaled=True),
    )
    for form in ("unit_sq_euclid", "cosine", "hinge_sq", "gauss")
}


@pytest.mark.holds(33)
@on_both_backends(FROM_HIDDEN)
def test_pairs_from_hidden_states(name: str, backend: str) -> None:
    loss, truth = FROM_HIDDEN[name]
    for early in (False, True):
        assert not preference_faults(loss, truth, len(name), backend, early=early)


@pytest.mark.holds(33)
@on_both_backends(KTO)
def test_kto_from_hidden_states(name: str, backend: str) -> None:
    truth = functools.partial(f.KTO, **KTO[name])
    for early in (False, True):
        assert not preference_faults(L.KTO(**KTO[name]), truth, len(name), backend, early=early)


@pytest.mark.holds(33)
@on_both_backends([n for n in SAMPLES if "estimator=k1" not in n and "estimator=k2" not in n])
def test_groups_from_hidden_states(name: str, backend: str) -> None:
    loss, truth = SAMPLES[name]
    old = "kl_weight" not in name
    for early in (False, True):
        assert not policy_faults(loss, truth, len(name), backend, old=old, early=early)


WEIGHTED = [n for n in SAMPLES if "kl_weight" not in n and "VESPO" not in n]


@pytest.mark.holds(33)
@on_both_backends(WEIGHTED)
def test_weighted_groups_from_hidden_states(name: str, backend: str) -> None:
    loss, truth = SAMPLES[name]
    weights = "per sequence" if loss.formula_structure.scope == "sequence" else "per token"
    for early in (False, True):
        assert not policy_faults(loss, truth, len(name), backend, weights=weights, early=early)


@pytest.mark.parametrize("weights", ["per sequence", "per token"])
def test_vespo_has_the_weights_of_a_response_in_its_ratio(weights: str) -> None:
    def truth(samples: list[f.Sample]) -> f.Result:
        product = [
            float(np.prod(s.weight)) if isinstance(s.weight, list) else s.weight for s in samples
        ]
        whole = [replace(s, weight=w) for s, w in zip(samples, product, strict=True)]
        return f.VESPO(whole, fold_weight=True)

    assert not policy_faults(L.VESPO(), truth, 1, "torch", weights=weights)


# the yardstick itself


def _missing(gradients: list[np.ndarray]) -> list[np.ndarray]:
    first = gradients[0].copy()
    first[-1] = 0.0
    return [first, *gradients[1:]]


WRONG = {
    "zero": lambda gradients: [0 * g for g in gradients],
    "too small": lambda gradients: [0.9 * g for g in gradients],
    "a token missing": _missing,
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_gradient_is_seen(wrong: str) -> None:
    pairs = f.random_pairs(np.random.default_rng(0), 3)
    right = true_of_pairs(L.DPO(), f.DPO(pairs))
    assert not faults(right, right)
    assert faults(replace(right, gradients=WRONG[wrong](right.gradients)), right)
    assert faults(replace(right, value=right.value * (1 + 1e-9)), right)


def _without_a_row(gradient: torch.Tensor) -> torch.Tensor:
    rows = gradient.flatten(0, -2).clone()
    rows[rows.norm(dim=-1).nonzero()[0]] = 0.0
    return rows.view_as(gradient)


WRONG_HIDDEN = {
    "zero": torch.zeros_like,
    "too small": lambda gradient: 0.9 * gradient,
    "a token missing": _without_a_row,
}


@pytest.mark.parametrize("wrong", WRONG_HIDDEN)
def test_a_wrong_gradient_of_hidden_states_is_seen(wrong: str) -> None:
    spoil = WRONG_HIDDEN[wrong]
    assert preference_faults(L.DPO(), f.DPO, 0, "torch", spoil=spoil)
    assert policy_faults(L.GRPO(), f.GRPO, 0, "torch", spoil=spoil)
    # and a wrong formula, though of the right size
    assert preference_faults(L.DPO(), functools.partial(f.DPO, beta=0.11), 0, "torch")
    assert policy_faults(L.GRPO(), f.DAPO, 0, "torch")

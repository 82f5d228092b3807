"""Every loss that TRL's trainers have, against those trainers: loss, gradients and metrics.

A name of ours beside a ``loss_type`` of TRL's says that they are the same function, factors, masks
and averages included. What TRL has and this library has not stands in NOT_OURS, with the reason.
"""

from __future__ import annotations

import dataclasses

import peers_trl as trl
import pytest
import torch
from oracles import relative

pytest.importorskip(
    "trl", minversion="1.16", reason="compares with the trainers of TRL 1.16, not installed"
)
# importing the trainers takes longer than the comparisons
# name -> (loss of ours, options of TRL's); the name is TRL's loss_type up to a comma
DPO = {
    "sigmoid": ("DPO(beta=0.1)", {}),
    "hinge": ("SLiC(beta=0.1)", {}),
    "ipo": ("IPO(beta=0.1)", {}),
    "exo_pair": ("EXO(beta=0.1, label_smoothing=1e-3)", {"label_smoothing": 1e-3}),
    "nca_pair": ("NCA(beta=0.1)", {}),
    "robust": ("RobustDPO(beta=0.1, label_smoothing=0.1)", {"label_smoothing": 0.1}),
    "bco_pair": ("BCO(beta=0.1)", {}),
    "sppo_hard": ("2.0 * SPPO(beta=0.1)", {}),
    "aot": ("AOT(beta=0.1)", {}),
    "aot, smoothed": ("AOT(beta=0.1, label_smoothing=0.2)", {"label_smoothing": 0.2}),
    "aot_unpaired": ("AOT(beta=0.1, paired=False)", {}),
    "aot_unpaired, smoothed": (
        "AOT(beta=0.1, paired=False, label_smoothing=0.2)",
        {"label_smoothing": 0.2},
    ),
    "apo_zero": ("APOZero(beta=0.1)", {}),
    "apo_down": ("APODown(beta=0.1)", {}),
    "discopop": ("DiscoPOP(beta=0.1, tau=0.05)", {"discopop_tau": 0.05}),
    "sft": ("SFT()", {}),
    "sigmoid_norm": ("DPO(beta=0.1, length_normalized=True)", {}),
}
KTO = {
    "kto": ("KTO(beta=0.1)", {}),
    "kto, weighted": (
        "KTO(beta=0.1, desirable_weight=1.3, undesirable_weight=0.7)",
        {"desirable_weight": 1.3, "undesirable_weight": 0.7},
    ),
    "apo_zero_unpaired": ("KTO(beta=0.1, variant='apo_zero')", {}),
}
CPO = {
    "sigmoid": ("CPO(beta=0.1)", {}),
    "sigmoid, smoothed": ("CPO(beta=0.1, label_smoothing=0.2)", {"label_smoothing": 0.2}),
    "sigmoid, plain": ("CPO(beta=0.1, nll_weight=0.0)", {"cpo_alpha": 0.0}),
    "hinge": ("CPO(beta=0.1, nll_weight=0.3, link='hinge')", {"cpo_alpha": 0.3}),
    "ipo": ("CPO(beta=0.1, link='ipo')", {}),
    "simpo": ("SimPO(beta=2.0, gamma=0.7)", {"beta": 2.0, "simpo_gamma": 0.7, "cpo_alpha": 0.0}),
    "simpo, with cross-entropy": ("SimPO(beta=2.0, sft_weight=1.0)", {"beta": 2.0}),
    "alphapo": ("AlphaPO(beta=2.0, gamma=0.5, alpha=0.25)", {"beta": 2.0, "alpha": 0.25}),
    "alphapo, negative": ("AlphaPO(beta=2.0, alpha=-0.5)", {"beta": 2.0, "alpha": -0.5}),
}
TPO = {
    "sigmoid": ("CPO(beta=0.1, nll_weight=0.0)", {}),
    "hinge": ("CPO(beta=0.1, nll_weight=0.0, link='hinge')", {}),
    "ipo": ("CPO(beta=0.1, nll_weight=0.0, link='ipo')", {}),
    "tpo-l": ("SimPO(beta=0.1, gamma=0.7)", {"tpo_l_gamma": 0.7}),
}
WHOLE = {"importance_sampling_level": "sequence"}
GRPO = {
    "grpo": ("GRPO()", {}),
    "grpo, other clips": (
        "GRPO(epsilon_low=0.1, epsilon_high=0.3)",
        {"epsilon_low": 0.1, "epsilon_high": 0.3},
    ),
    "grpo, kl": ("GRPO(kl_weight=0.04)", {"beta": 0.04}),
    "grpo, corrected kl": (
        "GRPO(kl_weight=0.04, kl_estimator='k3_corrected')",
        {"beta": 0.04, "use_bias_correction_kl": True},
    ),
    "grpo, two-sided": ("GRPO(ratio_cap=1.3)", {"delta": 1.3}),
    "grpo, entropy": ("GRPO(entropy_bonus=0.1)", {"entropy_coef": 0.1}),
    "grpo, by sequence": ("GSPO(epsilon_low=0.1, epsilon_high=0.1)", {"epsilon": 0.1, **WHOLE}),
    "grpo, by sequence, kl": (
        "GSPO(epsilon_low=0.1, epsilon_high=0.1, kl_weight=0.04)",
        {"epsilon": 0.1, "beta": 0.04, **WHOLE},
    ),
    "grpo, by sequence, corrected kl": (
        "GSPO(epsilon_low=0.1, epsilon_high=0.1, kl_weight=0.04, kl_estimator='k3_corrected')",
        {"epsilon": 0.1, "beta": 0.04, "use_bias_correction_kl": True, **WHOLE},
    ),
    "bnpo": ("DAPO(epsilon_high=0.2)", {}),
    "dapo": ("DAPO()", {"epsilon_high": 0.28}),
    "dapo, kl": ("DAPO(kl_weight=0.04)", {"epsilon_high": 0.28, "beta": 0.04}),
    "dr_grpo": ("DrGRPO(max_completion_length=16)", {"max_completion_length": 16}),
    "cispo": ("CISPO(epsilon_high=1.2)", {"epsilon_high": 1.2}),
    "cispo, kl": ("CISPO(epsilon_high=1.2, kl_weight=0.04)", {"epsilon_high": 1.2, "beta": 0.04}),
    "sapo": ("SoftAdaptive()", {}),
    "sapo, other temperatures": (
        "SoftAdaptive(tau_pos=2.0, tau_neg=0.5)",
        {"sapo_temperature_pos": 2.0, "sapo_temperature_neg": 0.5},
    ),
    "luspo": ("LUSPO(epsilon_low=0.1, epsilon_high=0.1)", {"epsilon": 0.1, **WHOLE}),
    "luspo, kl": (
        "LUSPO(epsilon_low=0.1, epsilon_high=0.1, kl_weight=0.04)",
        {"epsilon": 0.1, "beta": 0.04, **WHOLE},
    ),
    # TRL's own default level, which it warns of
    "luspo, by token": ("DrGRPO(max_completion_length=1)", {}),
    "vespo": ("VESPO()", {}),
    "vespo, other powers": (
        "VESPO(k_pos=1.5, lambda_pos=2.0, k_neg=2.0, lambda_neg=1.0)",
        {"vespo_k_pos": 1.5, "vespo_lambda_pos": 2.0, "vespo_k_neg": 2.0, "vespo_lambda_neg": 1.0},
    ),
}
NOT_OURS = {
    "rloo": "clips the ratio of the summed log-probabilities, once a response",
    "grpo, any but grpo and luspo by sequence": "weights sequences by their length; TRL warns",
    "importance weights of tokens, by sequence": "one ratio a response has one weight a response",
    "tpo with a gold response": "three branches, the cross-entropy of the third",
    "dpo, sft with WPO": "multiplies the mean cross-entropy by the weights of pairs",
}


def cases(table: dict) -> list:
    return [pytest.param(name.split(",")[0], *case, id=name) for name, case in table.items()]


def epsilons(options: dict) -> dict:
    """One epsilon for both sides, said once."""
    both = options.get("epsilon")
    kept = {k: v for k, v in options.items() if k != "epsilon"}
    return kept if both is None else {"epsilon_low": both, "epsilon_high": both, **kept}


@pytest.mark.parametrize("trainer", trl.LOSS_TYPES)
def test_every_loss_type_is_compared(trainer: str) -> None:
    """That TRL's code knows; a new one would be missed otherwise."""
    known = trl.source_loss_types(trainer)
    assert known == set(trl.LOSS_TYPES[trainer])
    table = {"dpo": DPO, "kto": KTO, "cpo": CPO, "tpo": TPO, "grpo": GRPO}[trainer]
    assert {name.split(",")[0] for name in table} == known | set(trl.SUGAR.get(trainer, ()))


@pytest.mark.holds(33)
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("loss_type, ours, options", cases(DPO))
def test_dpo(loss_type: str, ours: str, options: dict, seed: int) -> None:
    pairs = trl.rows(seed)
    peer = trl.dpo_loss(loss_type, pairs, beta=0.1, **options)
    # by itself it has no reference, which DPOTrainer's rewards are relative to
    other = ("rewards/",) if loss_type == "sft" else ()
    trl.agree(trl.preference(ours, pairs), peer, but=other)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "aot", "bco_pair"])
def test_dpo_with_a_reference_that_was_computed_before(loss_type: str) -> None:
    pairs = trl.rows(3)
    sums = pairs.logprobs(reference=True).sum(1)
    peer = trl.dpo_loss(loss_type, pairs, precomputed=True)
    trl.agree(trl.preference(DPO[loss_type][0], pairs, ref_logprobs=sums), peer)


@pytest.mark.holds(33)
@pytest.mark.parametrize("divergence", trl.F_DIVERGENCES)
@pytest.mark.parametrize("loss_type", [t for t in trl.F_DIVERGENCE_LOSS_TYPES if t != "sft"])
def test_f_divergence(loss_type: str, divergence: str) -> None:
    ours, options = DPO[loss_type]
    pairs = trl.rows(4)
    peer = trl.dpo_loss(loss_type, pairs, f_divergence=divergence, f_alpha=0.3, **options)
    alpha = ", alpha=0.3" * (divergence == "alpha_divergence")
    changed = f"FDivergence({ours}, divergence={divergence!r}{alpha})"
    trl.agree(trl.preference(changed, pairs), peer)


WEIGHTED = set(trl.LOSS_TYPES["dpo"]) - {*trl.UNWEIGHTED_LOSS_TYPES, "sft", "hinge"}


@pytest.mark.parametrize("loss_type", sorted(WEIGHTED))
def test_wpo(loss_type: str) -> None:
    ours, options = DPO[loss_type]
    pairs = trl.rows(5)
    peer = trl.dpo_loss(loss_type, pairs, use_weighting=True, **options)
    trl.agree(trl.preference(f"WPO({ours})", pairs), peer)


def test_the_value_of_wpo_on_a_hinge() -> None:
    """TRL 1.16 cannot differentiate it: the weight is multiplied into relu's result, in place."""
    pairs = trl.rows(5)
    peer = trl.dpo_loss("hinge", pairs, use_weighting=True)
    found, _ = trl.preference(f"WPO({DPO['hinge'][0]})", pairs)
    assert relative(found.loss, peer.loss) < trl.LOSS_ERROR
    with pytest.raises(RuntimeError, match="inplace"):
        peer.gradients()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("loss_type", [t for t in trl.LOSS_TYPES["dpo"] if t != "sft"])
def test_length_desensitized(loss_type: str, alpha: float) -> None:
    ours, options = DPO[loss_type]
    pairs = trl.rows(6)
    peer = trl.dpo_loss(loss_type, pairs, ld_alpha=alpha, **options)
    trl.agree(trl.preference(f"LengthDesensitized({ours}, alpha={alpha})", pairs), peer)


@pytest.mark.parametrize(
    "ours, types, weights",
    [
        ("0.8 * DPO() + 0.2 * BCO(beta=0.1) + 1.0 * SFT()", "sigmoid bco_pair sft", (0.8, 0.2, 1)),
        ("DPO() + 0.005 * SFT()", "sigmoid sft", (1, 0.005)),
        ("0.5 * IPO() + 0.5 * APOZero()", "ipo apo_zero", (0.5, 0.5)),
        ("1.0 * AOT(beta=0.1) + 2.0 * NCA(beta=0.1)", "aot nca_pair", (1, 2)),
    ],
)
def test_mixture(ours: str, types: str, weights: tuple) -> None:
    pairs = trl.rows(7)
    peer = trl.dpo_loss(types.split(), pairs, loss_weights=weights)
    trl.agree(trl.preference(ours, pairs), peer)


@pytest.mark.holds(33)
@pytest.mark.parametrize("seed", [1, 9])
@pytest.mark.parametrize("loss_type, ours, options", cases(KTO))
def test_kto(loss_type: str, ours: str, options: dict, seed: int) -> None:
    """For one seed the KL estimate is above 0, for the other it is limited to 0."""
    desirable = torch.tensor([True, False, True, True, False, False])
    batch = trl.rows(seed)
    mismatched = trl.rows(seed + 10, like=batch)
    own = mismatched.logprobs() - mismatched.logprobs(reference=True)
    kl = own.sum(1)
    assert (kl.mean() > 0) == (seed == 1)
    plain = loss_type == "apo_zero_unpaired"
    inputs = {} if plain else {"kl": kl}
    peer = trl.kto_loss(
        loss_type, batch, desirable, mismatched=None if plain else mismatched, **options
    )
    trl.agree(trl.preference(ours, batch, desirable=desirable, **inputs), peer)


@pytest.mark.parametrize("side", [True, False])
def test_kto_of_one_kind_only(side: bool) -> None:
    desirable = torch.full((6,), side)
    batch = trl.rows(8)
    peer = trl.kto_loss("apo_zero_unpaired", batch, desirable)
    found = trl.preference("KTO(variant='apo_zero')", batch, desirable=desirable)
    trl.agree(found, peer)


@pytest.mark.holds(33)
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("loss_type, ours, options", cases(CPO))
def test_cpo(loss_type: str, ours: str, options: dict, seed: int) -> None:
    pairs = trl.rows(seed)
    peer = trl.cpo_loss(loss_type, pairs, **options)
    trl.agree(trl.preference(ours, pairs), peer)


@pytest.mark.parametrize("loss_type, ours, options", cases(TPO))
def test_tpo(loss_type: str, ours: str, options: dict) -> None:
    pairs = trl.rows(9)
    peer = trl.tpo_loss(loss_type, pairs, beta=0.1, **options)
    trl.agree(trl.preference(ours, pairs), peer)


@pytest.mark.holds(33)
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_orpo(beta: float) -> None:
    """Without prompts, whose tokens TRL's cross-entropy counts as well."""
    pairs = trl.rows(1, prompts=False)
    peer = trl.orpo_loss(pairs, beta=beta)
    trl.agree(trl.preference(f"ORPO(beta={beta})", pairs), peer)


def test_orpo_with_prompts_but_for_the_cross_entropy() -> None:
    """What beta adds to TRL's loss is ours without cross-entropy."""
    pairs = trl.rows(2)
    with_odds, without = trl.orpo_loss(pairs, beta=0.5), trl.orpo_loss(pairs, beta=0.0)
    found, gradients = trl.preference("ORPO(beta=0.5, nll_weight=0.0)", pairs)
    assert relative(found.loss, with_odds.loss - without.loss) < trl.LOSS_ERROR
    alone = without.gradients()
    for name, exact in with_odds.gradients().items():
        assert relative(gradients[name], exact - alone[name]) < trl.GRADIENT_ERROR
    assert float(with_odds.metrics["log_odds_ratio"]) == pytest.approx(
        float(found.metrics["log_odds_ratio"]), rel=1e-4
    )


# sampled responses


@pytest.mark.holds(33)
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("loss_type, ours, options", cases(GRPO))
def test_grpo(loss_type: str, ours: str, options: dict, seed: int) -> None:
    batch, inputs = trl.sampled(seed)
    peer = trl.grpo_loss(loss_type, batch, **inputs, **epsilons(options))
    trl.agree(trl.policy(ours, batch, **inputs), peer)


@pytest.mark.parametrize("loss_type, ours, options", cases(GRPO))
def test_on_the_policy_that_sampled(loss_type: str, ours: str, options: dict) -> None:
    """No log-probabilities of an older policy: the ratio is 1, and its gradient is not 0."""
    batch, inputs = trl.sampled(3)
    del inputs["old_logprobs"]
    peer = trl.grpo_loss(loss_type, batch, **inputs, **epsilons(options))
    trl.agree(trl.policy(ours, batch, **inputs), peer)


@pytest.mark.parametrize("loss_type", ["bnpo", "dapo", "cispo", "vespo", "dr_grpo", "grpo"])
def test_one_micro_batch_of_several(loss_type: str) -> None:
    """TRL divides by the tokens of the step, or the micro-batch's mean by their number."""
    ours, options = GRPO[loss_type]
    batch, inputs = trl.sampled(4)
    peer = trl.grpo_loss(
        loss_type, batch, **inputs, **epsilons(options), accumulation=2, num_items=77.0
    )
    step = {"num_tokens": 77.0}
    if loss_type == "bnpo":
        step = {"num_tokens": 2 * int(batch.mask.sum())}
    elif loss_type in ("grpo", "dr_grpo"):
        step = {"num_items": 2 * len(batch.tokens)}
    trl.agree(trl.policy(ours, batch, **inputs, **step), peer)


BY_RESPONSE = {name: case for name, case in GRPO.items() if "entropy" not in name}
BY_TOKEN = {name: case for name, case in BY_RESPONSE.items() if "sequence" not in str(case[1])}


@pytest.mark.parametrize("loss_type, ours, options", cases(BY_RESPONSE))
def test_importance_weights(loss_type: str, ours: str, options: dict) -> None:
    """TRL's correction for another sampler: of the policy's part only; in VESPO, of the ratio."""
    batch, inputs = trl.sampled(5)
    # of them one response was masked out
    inputs["importance_weights"] = torch.tensor([0.8, 0.0, 1.0, 1.2, 0.6, 1.9])
    peer = trl.grpo_loss(loss_type, batch, **inputs, **epsilons(options))
    trl.agree(trl.policy(ours, batch, **inputs), peer)


@pytest.mark.parametrize("loss_type, ours, options", cases(BY_TOKEN))
def test_importance_weights_of_tokens(loss_type: str, ours: str, options: dict) -> None:
    batch, inputs = trl.sampled(5)
    weights = 0.5 + torch.rand(batch.mask.shape, generator=torch.Generator().manual_seed(0))
    inputs["importance_weights"] = weights.masked_fill(~batch.mask, 1.0)
    peer = trl.grpo_loss(loss_type, batch, **inputs, **epsilons(options))
    trl.agree(trl.policy(ours, batch, **inputs), peer)


def test_a_loss_that_cancels_is_judged_by_its_terms_and_wrong_ones_are_not_excused() -> None:
    """VESPO's on these rows is a tenth of them: a zero, 0.9 of it, and a response less show."""
    batch, inputs = trl.sampled(5)
    peer = trl.grpo_loss("vespo", batch, **inputs)
    out, gradients = trl.policy("VESPO()", batch, **inputs)
    lengths = batch.lengths
    response = out.per_example[1] * lengths[1] / lengths.sum()
    for wrong in (out.loss * 0, out.loss * 0.9, out.loss - response):
        spoilt = dataclasses.replace(out, loss=wrong.detach())
        assert any(said.startswith("loss:") for said in trl.faults((spoilt, gradients), peer))
    for factor in (0.0, 0.9):
        spoilt = {name: factor * gradient for name, gradient in gradients.items()}
        assert len(trl.faults((out, spoilt), peer)) == 2


def test_off_policy_mask() -> None:
    """As weights of 0 and 1, which is what it is."""
    batch, inputs = trl.sampled(6)
    threshold = 0.0
    keep = trl.off_policy_mask(batch, inputs["advantages"], inputs["old_logprobs"], threshold)
    assert 0 < int(keep.sum()) < len(keep)
    peer = trl.grpo_loss("grpo", batch, **inputs, beta=0.04, off_policy_mask_threshold=threshold)
    found = trl.policy("GRPO(kl_weight=0.04)", batch, **inputs, importance_weights=keep)
    trl.agree(found, peer)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "sapo"])
def test_temperature(loss_type: str) -> None:
    ours, options = GRPO[loss_type]
    batch, inputs = trl.sampled(7)
    peer = trl.grpo_loss(loss_type, batch, **inputs, **options, temperature=0.7)
    trl.agree(trl.policy(ours, batch, **inputs, temperature=0.7), peer)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "cispo", "sapo"])
def test_advantages_of_tokens(loss_type: str) -> None:
    ours, options = GRPO[loss_type]
    batch, inputs = trl.sampled(8)
    g = torch.Generator().manual_seed(0)
    inputs["advantages"] = torch.randn(batch.mask.shape, generator=g)
    peer = trl.grpo_loss(loss_type, batch, **inputs, **options)
    trl.agree(trl.policy(ours, batch, **inputs), peer)


@pytest.mark.parametrize("kl_weight", [0.0, 0.04])
def test_gmpo(kl_weight: float) -> None:
    batch, inputs = trl.sampled(9)
    peer = trl.gmpo_loss(batch, **inputs, epsilon_low=0.2, epsilon_high=0.2, beta=kl_weight)
    trl.agree(trl.policy(f"GMPO(epsilon=0.2, kl_weight={kl_weight})", batch, **inputs), peer)

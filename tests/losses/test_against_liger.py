"""Every loss that Liger-Kernel's chunked modules have, against those modules.

A name of ours beside one of Liger's says that they are the same function, factors, masks and
averages included. What Liger has and this library has not stands in NOT_OURS, with the reason.
"""

from __future__ import annotations

import peers_liger as liger
import peers_trl as peers
import pytest
import torch

pytest.importorskip(
    "liger_kernel.chunked_loss",
    reason="compares with the chunked losses of Liger-Kernel, not installed",
)
# importing the modules takes longer than the comparisons
# name -> (loss of ours, options of Liger's); the name is Liger's loss_type up to a comma
DPO = {
    "sigmoid": ("DPO(beta=0.1)", {}),
    "sigmoid, averages": ("DPO(beta=0.1, length_normalized=True)", {"average_log_prob": True}),
    "sigmoid, with cross-entropy": ("DPO(beta=0.1) + 0.3 * SFT()", {"nll_weight": 0.3}),
    "hinge": ("SLiC(beta=0.1)", {}),
    "exo_pair": ("EXO(beta=0.1, label_smoothing=1e-3)", {"label_smoothing": 1e-3}),
    "nca_pair": ("NCA(beta=0.1)", {}),
    "robust": ("RobustDPO(beta=0.1, label_smoothing=0.1)", {"label_smoothing": 0.1}),
    "bco_pair": ("BCO(beta=0.1)", {}),
    "sppo_hard": ("2.0 * SPPO(beta=0.1)", {}),
    "apo_zero": ("APOZero(beta=0.1)", {}),
    "apo_zero, with cross-entropy": ("APOZero(beta=0.1) + 0.3 * SFT()", {"nll_weight": 0.3}),
    "apo_down": ("APODown(beta=0.1)", {}),
    "discopop": ("DiscoPOP(beta=0.1, tau=0.05)", {"discopop_tau": 0.05}),
}
WHOLE = {"importance_sampling_level": "sequence"}
CLIPS = {"epsilon_low": 0.1, "epsilon_high": 0.1}
CORRECTED = {"beta": 0.04, "use_bias_correction_kl": True}
GRPO = {
    "grpo": ("GRPO()", {}),
    "grpo, other clips": (
        "GRPO(epsilon_low=0.1, epsilon_high=0.3)",
        {"epsilon_low": 0.1, "epsilon_high": 0.3},
    ),
    "grpo, kl": ("GRPO(kl_weight=0.04)", {"beta": 0.04}),
    "grpo, corrected kl": ("GRPO(kl_weight=0.04, kl_estimator='k3_corrected')", CORRECTED),
    "grpo, two-sided": ("GRPO(ratio_cap=1.3)", {"delta": 1.3}),
    "grpo, temperature": ("GRPO()", {"temperature": 0.7}),
    "grpo, by sequence": ("GSPO(epsilon_low=0.1, epsilon_high=0.1)", {**CLIPS, **WHOLE}),
    "grpo, by sequence, kl": (
        "GSPO(epsilon_low=0.1, epsilon_high=0.1, kl_weight=0.04)",
        {"beta": 0.04, **CLIPS, **WHOLE},
    ),
    "grpo, by sequence, corrected kl": (
        "GSPO(epsilon_low=0.1, epsilon_high=0.1, kl_weight=0.04, kl_estimator='k3_corrected')",
        {**CORRECTED, **CLIPS, **WHOLE},
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
    "luspo": ("LUSPO(epsilon_low=0.1, epsilon_high=0.1)", {**CLIPS, **WHOLE}),
    "vespo": ("VESPO()", {}),
    "vespo, other powers": (
        "VESPO(k_pos=1.5, lambda_pos=2.0, k_neg=2.0, lambda_neg=1.0)",
        {"vespo_k_pos": 1.5, "vespo_lambda_pos": 2.0, "vespo_k_neg": 2.0, "vespo_lambda_neg": 1.0},
    ),
}
NOT_OURS = {
    "luspo by token, or with a KL term": "Liger's mean is then over padding too; TRL's is not",
    "importance weights of tokens, by sequence": "one ratio a response has one weight a response",
    "bnpo, dr_grpo, dapo by sequence": "weights sequences by their length",
    "dpo of averages, but sigmoid": "no paper's loss; ours are of sums, or IPO",
}


def cases(table: dict) -> list:
    return [pytest.param(name.split(",")[0], *case, id=name) for name, case in table.items()]


@pytest.mark.parametrize("module", liger.LOSS_TYPES)
def test_every_loss_type_is_compared(module: str) -> None:
    """That Liger's code knows; a new one would be missed otherwise."""
    known = liger.source_loss_types(module)
    assert known == set(liger.LOSS_TYPES[module])
    assert {name.split(",")[0] for name in {"dpo": DPO, "grpo": GRPO}[module]} == known


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("loss_type, ours, options", cases(DPO))
def test_dpo(loss_type: str, ours: str, options: dict, chunk_size: int) -> None:
    pairs = peers.rows(1)
    peer = liger.dpo_loss(loss_type, pairs, beta=0.1, chunk_size=chunk_size, **options)
    # Liger's are averages too then
    other = ("logps/", "rewards/") if "average_log_prob" in options else ()
    peers.agree(peers.preference(ours, pairs), peer, but=other)


@pytest.mark.parametrize(
    "ours, options",
    [
        ("CPO(beta=0.1)", {}),
        ("CPO(beta=0.1, nll_weight=0.3)", {"nll_weight": 0.3}),
        ("CPO(beta=0.1, label_smoothing=0.2)", {"label_smoothing": 0.2}),
    ],
)
def test_cpo(ours: str, options: dict) -> None:
    pairs = peers.rows(2)
    peers.agree(peers.preference(ours, pairs), liger.cpo_loss(pairs, **options))


@pytest.mark.parametrize(
    "ours, options",
    [
        ("SimPO(beta=2.0, gamma=0.7)", {"gamma": 0.7, "nll_weight": 0.0}),
        ("SimPO(beta=2.0, sft_weight=1.0)", {}),
        ("SimPO(beta=2.0, label_smoothing=0.2)", {"label_smoothing": 0.2, "nll_weight": 0.0}),
    ],
)
def test_simpo(ours: str, options: dict) -> None:
    pairs = peers.rows(3)
    peer = liger.simpo_loss(pairs, beta=2.0, **options)
    peers.agree(peers.preference(ours, pairs), peer)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_orpo(beta: float) -> None:
    """Cross-entropy of the completions, as Liger has it unless it is given other targets."""
    pairs = peers.rows(4)
    peer = liger.orpo_loss(pairs, beta=beta)
    peers.agree(peers.preference(f"ORPO(beta={beta})", pairs), peer)


@pytest.mark.parametrize("kl", [None, 0.0, 0.4])
def test_kto(kl: float | None) -> None:
    desirable = torch.tensor([True, False, True, True, False, False])
    batch = peers.rows(5)
    given = None if kl is None else torch.tensor(kl)
    peer = liger.kto_loss(batch, desirable, kl=given)
    ours = "KTO(beta=0.1, variant='apo_zero')" if kl is None else "KTO(beta=0.1)"
    inputs = {} if kl is None else {"kl": given[None]}
    peers.agree(peers.preference(ours, batch, desirable=desirable, **inputs), peer)


@pytest.mark.parametrize("chunk_size", [1, 4])
@pytest.mark.parametrize("loss_type, ours, options", cases(GRPO))
def test_grpo(loss_type: str, ours: str, options: dict, chunk_size: int) -> None:
    batch, inputs = peers.sampled(1)
    peer = liger.grpo_loss(loss_type, batch, **inputs, chunk_size=chunk_size, **options)
    own = {"temperature": options["temperature"]} if "temperature" in options else {}
    peers.agree(peers.policy(ours, batch, **inputs, **own), peer)


@pytest.mark.parametrize("loss_type, ours, options", cases(GRPO))
def test_on_the_policy_that_sampled(loss_type: str, ours: str, options: dict) -> None:
    batch, inputs = peers.sampled(2)
    del inputs["old_logprobs"]
    peer = liger.grpo_loss(loss_type, batch, **inputs, **options)
    own = {"temperature": options["temperature"]} if "temperature" in options else {}
    peers.agree(peers.policy(ours, batch, **inputs, **own), peer)


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo"])
def test_tokens_of_the_step(loss_type: str) -> None:
    ours, options = GRPO[loss_type]
    batch, inputs = peers.sampled(6)
    peer = liger.grpo_loss(loss_type, batch, **inputs, **options, num_items=77.0)
    peers.agree(peers.policy(ours, batch, **inputs, num_tokens=77.0), peer)


BY_RESPONSE = {name: case for name, case in GRPO.items() if "temperature" not in name}
BY_TOKEN = {name: case for name, case in BY_RESPONSE.items() if "sequence" not in str(case[1])}


@pytest.mark.parametrize("loss_type, ours, options", cases(BY_RESPONSE))
def test_importance_weights(loss_type: str, ours: str, options: dict) -> None:
    batch, inputs = peers.sampled(4)
    # of them one response was masked out
    inputs["importance_weights"] = torch.tensor([0.8, 0.0, 1.0, 1.2, 0.6, 1.9])
    peer = liger.grpo_loss(loss_type, batch, **inputs, **options)
    peers.agree(peers.policy(ours, batch, **inputs), peer)


@pytest.mark.parametrize("loss_type, ours, options", cases(BY_TOKEN))
def test_importance_weights_of_tokens(loss_type: str, ours: str, options: dict) -> None:
    batch, inputs = peers.sampled(4)
    weights = 0.5 + torch.rand(batch.mask.shape, generator=torch.Generator().manual_seed(0))
    inputs["importance_weights"] = weights.masked_fill(~batch.mask, 1.0)
    peer = liger.grpo_loss(loss_type, batch, **inputs, **options)
    peers.agree(peers.policy(ours, batch, **inputs), peer)

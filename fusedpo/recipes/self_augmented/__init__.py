"""Self-Augmented Preference Optimization: rejected responses from the policy's own average.

The data half of Yin et al., arXiv 2405.20830; the loss is any pairwise one (theirs: DPO, ORPO).
Rows have a prompt x and a good response y. Every step:

    theta_ema <- decay theta_ema + (1 - decay) theta    where step % ema_every == 0
    theta_ref <- theta_ema                              where step % ref_every == 0
    u         ~  Uniform{0, ..., |y| - 3 - L}           L = min(segment_length, |y|)
    s         ~  pi_ema(. | x, y[:u])                   L tokens
    y_l       =  y[:u] + s + y[u+L:]                    cut after an end of sequence in s

(y, y_l) goes into a first-in first-out buffer, and pairs to train on are drawn from it with a
probability proportional to 1 / (times drawn + 1). Numbers and details are those of the authors'
code, which averages at every step and renews the reference of DPO at steps that are multiples of
108, about once an epoch of their data; the paper averages at every second step (``ema_every=2``).
Between renewals the reference stays as it is: one that followed the average would be a step behind
the policy, and DPO's margin would never leave 0. Not the loss that is called SAPO elsewhere (Soft
Adaptive Policy Optimization).

    source = SelfAugmented(model, rows, eos_token_id=2, pad_token_id=0, ref_model=reference)
    for _ in range(steps):
        loss = loss_of(source.next_batch(8))
        ...
        optimizer.step()
        source.after_step(model)

``fusedpo.trainers.self_augmented`` has the same inside a Trainer.
"""

from __future__ import annotations

from fusedpo.data.rows import TokenRow as PairRow
from fusedpo.data.sampling import generate_segments
from fusedpo.recipes.self_augmented.average import PolicyAverage
from fusedpo.recipes.self_augmented.buffer import ReplayBuffer
from fusedpo.recipes.self_augmented.loop import plain_loop
from fusedpo.recipes.self_augmented.prefix import mask_shared_prefix
from fusedpo.recipes.self_augmented.segments import choose_segment, splice
from fusedpo.recipes.self_augmented.settings import PairSettings, Settings
from fusedpo.recipes.self_augmented.source import SelfAugmented

__all__ = [
    "PairRow",
    "PairSettings",
    "PolicyAverage",
    "ReplayBuffer",
    "SelfAugmented",
    "Settings",
    "choose_segment",
    "generate_segments",
    "mask_shared_prefix",
    "plain_loop",
    "splice",
]

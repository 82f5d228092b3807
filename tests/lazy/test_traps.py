"""Programs that a shortcut would get wrong: what shares memory, what has a gradient, which rows and
entries are meant. Logits are made where they must be; the numbers are torch's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lazy.harness import Inputs, V, agree, run
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

TRAPS: dict[str, Callable[[Tensor, Inputs], Any]] = {}


def trap(program: Callable[[Tensor, Inputs], Any]) -> Callable[[Tensor, Inputs], Any]:
    TRAPS[program.__name__] = program
    return program


class Cosines(torch.autograd.Function):
    """A function of somebody's, which torch's dispatch of operations does not see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.sin())
        return x.cos().sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (sines,) = ctx.saved_tensors
        return -g * sines


class Weighted(torch.autograd.Function):
    """Another one, whose gradient differs from number to number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(weights)
        return (x * weights).sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        return g * weights, None


def logps(z: Tensor, labels: Tensor) -> Tensor:
    return z.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)


# rows and entries


@trap
def joined_rows_keep_their_own_labels(z, d):
    other = (d.tokens + 1) % V
    return torch.cat([logps(z, d.tokens)[:, :3], logps(z, other)[:, 3:]], 1)


@trap
def a_flip_of_the_vocabulary(z, d):
    return z.flip(-1)[..., 0] + 0


@trap
def a_roll_of_the_vocabulary(z, d):
    return z.roll(1, -1).argmax(-1).double()


@trap
def a_roll_of_everything(z, d):
    return z.roll(1).argmax(-1).double()


@trap
def some_tokens_by_index_select(z, d):
    return z.index_select(-1, torch.tensor([0])), z.index_select(-1, torch.tensor([5, 2]))


@trap
def an_axis_behind_the_vocabulary(z, d):
    return torch.stack([z], -1).sum(2)


@trap
def negative_labels_of_an_index_count_from_the_end(z, d):
    rows, steps = torch.arange(z.shape[0]).repeat_interleave(z.shape[1]), torch.arange(z.shape[1])
    labels = d.tokens.reshape(-1) - V
    return z.log_softmax(-1)[rows, steps.repeat(z.shape[0]), labels]


@trap
def empty_selections(z, d):
    lp = logps(z, d.tokens)
    return z[0:0].logsumexp(-1), lp[0:0].sum(), lp[torch.zeros_like(d.mask)].sum()


@trap
def single_numbers(z, d):
    return z[0, 0].argmax().double(), z[-1, -2].log_softmax(-1)[3], z[0, torch.tensor(1), 7]


@trap
def rows_twice(z, d):
    lp = z[torch.tensor([0, 0, 1])].log_softmax(-1)
    return lp.gather(-1, d.tokens[torch.tensor([0, 1, 1])][..., None]), torch.cat([z, z]).mean()


# arguments


@trap
def positional_unbiased(z, d):
    return z.std(-1, False), z.std(-1, True), z.var(-1, False, True), z.var(-1, correction=0)


@trap
def spread_of_equal_numbers(z, d):
    return (z - z).std()


@trap
def norms(z, d):
    return z.norm(2, -1), z.norm(3), z.norm(dim=-1)


@trap
def the_larger_of_two(z, d):
    return torch.max(z, torch.tensor(-1.0)), torch.max(z, torch.zeros(V))


@trap
def largest_of_ties(z, d):
    return (z * 0).max(-1).values, (z * 0).amax(-1), (z * 0).argmax(-1).double()


@trap
def ties_are_no_accuracy(z, d):
    same = z * 0
    return (same.argmax(-1) == 0).double(), (same.argmax(-1) == d.tokens).double()


@trap
def overflow_is_mended(z, d):
    return (z.detach() * 100).exp().nan_to_num().amax(-1)


@trap
def odd_temperatures(z, d):
    signs = torch.tensor([-2.0, 1.0, -1.0, 0.5]).view(4, 1, 1)
    return logps(z / -2.0, d.tokens), logps(z / signs, d.tokens), logps(z * (signs > 0), d.tokens)


@trap
def odd_temperatures_in_place(z, d):
    z.div_(-2.0)
    return logps(z, d.tokens)


@trap
def rows_switched_off_in_place(z, d):
    z.mul_(torch.tensor([1.0, 0.0, 1.0, 1.0]).view(4, 1, 1))
    return logps(z, d.tokens)


@trap
def divided_twice_in_place(z, d):
    z.div_(d.temperatures)
    z.true_divide_(3.0)
    return logps(z, d.tokens)


@trap
def alpha(z, d):
    return torch.add(z, z, alpha=2).logsumexp(-1)


@trap
def negative_logits_cut_off_in_place(z, d):
    functional.relu(z, inplace=True)
    return z.logsumexp(-1)


@trap
def a_view_copy(z, d):
    return torch.view_copy(z, (-1, V)).logsumexp(-1), torch.ops.aten.alias(z).logsumexp(-1)


# several statistics


@trap
def entropy_where_no_token_is_the_label(z, d):
    hits = z.argmax(-1) == d.labels
    probabilities = z.softmax(-1)
    entropy = -(probabilities * z.log_softmax(-1)).sum(-1)
    return entropy.detach() + 0, hits.double()


# gradients


@trap
def arguments_by_keyword(z, d):
    halves = torch.div(input=z, other=2.0)
    picked = torch.gather(input=halves, dim=-1, index=d.tokens[..., None]).squeeze(-1)
    return picked - torch.logsumexp(input=halves, dim=-1), torch.softmax(input=z, dim=-1).amax(-1)


@trap
def activation_checkpointing(z, d):
    def entropy(x: Tensor) -> Tensor:
        return x.logsumexp(-1) - (x.softmax(-1) * x).sum(-1)

    def ratio(x: Tensor) -> Tensor:
        return (logps(x, d.tokens) - d.old).exp()

    return [checkpoint(f, z, use_reentrant=False) for f in (entropy, ratio)]


@trap
def a_hook_on_the_gradient(z, d):
    halves = z / 2
    halves.register_hook(lambda g: 3 * g)
    log_probs = logps(halves, d.tokens)
    log_probs.register_hook(lambda g: g * d.mask)
    return log_probs


@trap
def joined_with_what_has_no_gradient(z, d):
    lp = logps(z, d.tokens)
    rows = torch.cat([z[:1].detach(), z[1:]])
    return torch.cat([lp[:1].detach(), lp[1:]]), rows.logsumexp(-1)


@trap
def less_a_detached_maximum(z, d):
    shifted = z - z.max(-1, keepdim=True).values.detach()
    return shifted.gather(-1, d.tokens[..., None]), (z.softmax(-1).detach() * z).sum(-1)


@trap
def scaled_under_no_grad(z, d):
    with torch.no_grad():
        z.div_(2)
    return logps(z, d.tokens)


@trap
def scaled_behind_a_detach(z, d):
    z.detach().div_(2)
    return logps(z, d.tokens)


@trap
def scaled_behind_data(z, d):
    z.data.div_(2)
    return logps(z, d.tokens)


@trap
def a_custom_function(z, d):
    return Cosines.apply(z), Cosines.apply(z[:, 1:])


@trap
def a_custom_function_of_what_was_scaled(z, d):
    before = Cosines.apply(z)
    z.div_(2)
    return before, Cosines.apply(z)


@trap
def a_custom_function_of_a_view_of_what_was_scaled(z, d):
    rows = z[:, :-1]
    z.div_(d.temperatures)
    return Cosines.apply(rows)


@trap
def a_custom_function_of_what_was_written_to(z, d):
    rows = z[:, :-1]
    z[..., 3] = -1.0
    return Cosines.apply(z), Cosines.apply(rows)


@trap
def gradients_that_are_kept(z, d):
    z.retain_grad()
    (z.logsumexp(-1) ** 2).sum().backward(retain_graph=True)
    leaf = z.detach().requires_grad_()
    leaf[:, 1:].logsumexp(-1).sum().backward()
    return z.grad, leaf.grad


# shared memory


@trap
def numbers_from_before_a_change(z, d):
    before, copies = logps(z, d.tokens), (z.clone(), z[d.mask], z.float() * 1)
    z.div_(2)
    return before, logps(z, d.tokens), *(each.logsumexp(-1) for each in copies)


@trap
def an_expanded_view(z, d):
    rows = z.unsqueeze(0).expand(2, -1, -1, -1)
    z.div_(2)
    return rows.logsumexp(-1)


@trap
def a_numpy_mask_makes_a_copy(z, d):
    rows = z[d.mask.numpy()]
    rows.div_(2)
    return z.logsumexp(-1), rows.logsumexp(-1)


@trap
def a_tensor_without_dimensions_makes_a_view(z, d):
    rows = z[torch.tensor(1)]
    rows.div_(2)
    return z.logsumexp(-1)


@trap
def true_makes_a_copy(z, d):
    rows = z[True]
    rows.div_(2)
    return z.logsumexp(-1)


@trap
def rows_that_follow_each_other_in_a_copy(z, d):
    rows = z[d.mask]
    rows[1:3].contiguous().div_(2)
    rows[4:6].reshape(1, 2, V).div_(3)
    return rows.logsumexp(-1)


@trap
def reshaped_rows_apart_are_a_copy(z, d):
    z[:, 1:].reshape(-1, V).div_(2)
    z[:, 1:].contiguous().div_(2)
    z.reshape(-1, V)[3].div_(3)
    return z.logsumexp(-1)


@trap
def one_entry_is_a_view(z, d):
    entry, other = z[..., 3], z[0, :, 5]
    z.div_(2)
    entry.mul_(3)
    return entry + 0, other + 0, z.logsumexp(-1)


@trap
def one_entry_that_is_read_after_a_change(z, d):
    entry = z[..., 3]
    z.div_(2)
    return entry + 0


@trap
def rows_scaled_in_place(z, d):
    z.mul_(torch.arange(1, z.shape[1] + 1)[:, None] / z.shape[1])
    return logps(z, d.tokens)


@trap
def labels_after_other_labels(z, d):
    first = logps(z, d.tokens) * d.mask
    return first, logps(z, (d.tokens + 1) % V) * d.mask, logps(z, d.tokens) * d.mask


@trap
def the_mean_of_scaled_logits(z, d):
    return (z / 0.7).mean(-1), (z * 3).mean(), (z / d.mask.double().add(1)[..., None]).mean(-1)


@trap
def a_number_less_logits_and_over_them(z, d):
    p = z.softmax(-1)
    return (2 - z).logsumexp(-1), (1 - p).log().sum(-1), (1 / (p + 1)).sum(-1)


@trap
def somebodys_function_of_moved_axes(z, d):
    weights = torch.arange(z.numel()).view(z.transpose(1, 2).shape) / z.numel()
    return Weighted.apply(z.transpose(1, 2), weights)


@trap
def an_unknown_view_of_a_view(z, d):
    diagonal = z[:, 1:].diagonal(0, 0, 1)
    z.div_(2)
    return diagonal + 0


@trap
def an_array_of_numpys(z, d):
    seen = z.detach()
    array = seen.numpy()
    seen.div_(2)
    return torch.from_numpy(array).clone()


@trap
def bias_added_in_place(z, d):
    z.add_(torch.arange(V) / V)
    return logps(z, d.tokens)


@trap
def written_through_a_view(z, d):
    z[:, :-1][..., 3] = -float("inf")
    return z.softmax(-1)


@trap
def tokens_forbidden_in_place(z, d):
    rows = z[1:]
    z.masked_fill_(torch.arange(V) > 200, -1e9)
    return rows.logsumexp(-1), z.logsumexp(-1)


@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_has_torchs_numbers_and_gradients(name: str) -> None:
    plain = run(TRAPS[name], lazy=False, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lazy = run(TRAPS[name], lazy=True, dtype=torch.float32, unknown="warn")
    for value, expected in zip(lazy.values, plain.values, strict=True):
        agree(value, expected, 1e-5)
    for gradient, expected in zip(lazy.gradients, plain.gradients, strict=True):
        agree(gradient, expected, 1e-5)


@pytest.mark.parametrize("scored", [False, True])
def test_a_hook_that_comes_too_late_is_refused(scored: bool) -> None:
    def late(z: Tensor, d: Inputs) -> Tensor:
        log_probs = logps(z, d.tokens)
        loss = (log_probs * d.mask).sum()
        (log_probs if scored else z).register_hook(lambda g: 2 * g)
        return loss

    with pytest.raises(RuntimeError, match="call it before"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(late, lazy=True, dtype=torch.float32, unknown="warn")


# what a program has a place for


OUTPUTS: dict[str, Callable[[Tensor, Inputs, Tensor], Any]] = {
    "softmax": lambda z, d, out: torch.softmax(z, -1, out=out),
    "log_softmax": lambda z, d, out: torch.log_softmax(z, -1, out=out),
    "logsumexp": lambda z, d, out: torch.logsumexp(z, -1, out=out),
    "exp": lambda z, d, out: torch.exp(z, out=out),
    "add": lambda z, d, out: torch.add(z, 1, out=out),
    "max": lambda z, d, out: torch.max(z, -1, out=(out, out.long())),
    "gather": lambda z, d, out: torch.gather(z, -1, d.tokens[..., None], out=out),
    "cat": lambda z, d, out: torch.cat([z, z], out=out),
    "index_select": lambda z, d, out: torch.index_select(z, 0, torch.tensor([1]), out=out),
    "masked_select": lambda z, d, out: torch.masked_select(z.logsumexp(-1), d.mask, out=out),
    "eq": lambda z, d, out: torch.eq(z.argmax(-1), d.tokens, out=out),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_numbers_are_written_where_a_program_wants_them(name: str) -> None:
    def program(z: Tensor, d: Inputs) -> Tensor:
        out = torch.empty(0, dtype=torch.bool if name == "eq" else z.dtype)
        with torch.no_grad():
            OUTPUTS[name](z, d, out)
        return out.double()

    plain = run(program, lazy=False, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lazy = run(program, lazy=True, dtype=torch.float32, unknown="warn")
    assert plain.values[0].numel()
    agree(lazy.values[0], plain.values[0], 1e-5)


# what torch refuses


REFUSED: dict[str, Callable[[Tensor, Inputs], Any]] = {
    "gather of -100": lambda z, d: logps(z, d.labels),
    "gather of -100, masked after": lambda z, d: logps(z, d.labels) * d.mask,
    "gather of a token too many": lambda z, d: logps(z, d.tokens.masked_fill(d.mask, V)),
    "cross-entropy of a token too many": lambda z, d: functional.cross_entropy(
        z.view(-1, V), d.tokens.masked_fill(d.mask, V).view(-1)
    ),
    "a token too many": lambda z, d: z[0, 0, V],
    "a row too many": lambda z, d: z[0, 500],
    "a view of rows apart": lambda z, d: z[:, :-1].view(-1, V).logsumexp(-1),
    "a size that is not there": lambda z, d: z.view(-1, V + 1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_refuses_is_refused(name: str) -> None:
    for lazy in (False, True):
        with pytest.raises((RuntimeError, IndexError)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(REFUSED[name], lazy=lazy, dtype=torch.float32, unknown="warn")

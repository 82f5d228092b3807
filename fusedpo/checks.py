"""The errors a user can meet, in one form: argument, what was expected, what came, remedy."""

from __future__ import annotations

import contextlib
import difflib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

_LEAST_TORCH = (2, 6)
TORCH = tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2])
# here, as this module is imported before whatever an older one may lack
if TORCH < _LEAST_TORCH:
    _least = ".".join(map(str, _LEAST_TORCH))
    raise ImportError(
        f"fusedpo: expected torch {_least} or newer, got {torch.__version__}; "
        f"pip install 'torch>={_least}'"
    )


def tracing() -> bool:
    """Whether a graph is being traced, so that no number can be read."""
    return torch.compiler.is_compiling()


FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LABELS = (torch.int64, torch.int32)


def bad_value(argument: str, expected: str, got: str, remedy: str = "") -> ValueError:
    return ValueError(
        f"{argument}: expected {expected}, got {got}" + (f"; {remedy}" if remedy else "")
    )


def bad_type(argument: str, expected: str, got: str, remedy: str = "") -> TypeError:
    return TypeError(
        f"{argument}: expected {expected}, got {got}" + (f"; {remedy}" if remedy else "")
    )


def bad_choice(argument: str, got: object, known: Iterable[str], listed: str = "") -> ValueError:
    """listed: of many names, where they are to be seen, rather than in the error."""
    known = tuple(known)
    names = f"{len(known)} names" if listed else ", ".join(map(repr, known))
    remedy = f"{near_names(got, known)} {listed}".strip()
    return bad_value(argument, f"one of {names}", repr(got), remedy)


def near_names(got: object, known: Iterable[str]) -> str:
    """A question whether one of the known names was meant; empty if none is near."""
    near = difflib.get_close_matches(str(got), tuple(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else ""


@contextlib.contextmanager
def called(name: str, argument: str) -> Iterator[None]:
    """Errors about an argument, under the name that the user gave it by."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        if str(error).startswith(f"{argument}: "):
            told = name + str(error).removeprefix(argument)
            error.args = (told, *error.args[1:])
            if isinstance(error, ImportError):
                error.msg = told  # which it shows in their place
        raise


def number(argument: str, value: object) -> float:
    """A finite Python number; NaN and infinity are refused."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise bad_type(argument, "a number", type(value).__name__)
    found = float(value)
    if not -math.inf < found < math.inf:  # math.isfinite cannot be traced
        raise bad_value(argument, "a finite number", str(value))
    return found


def written(argument: str, value: object) -> str:
    """A text that can be encoded: a string may hold half of a character, as JSON can write it."""
    if not isinstance(value, str):
        raise bad_type(argument, "text", type(value).__name__)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(value[error.start])
        got = f"half of a surrogate pair, {half}, at character {error.start + 1}"
        raise bad_value(argument, "text of whole characters", got, "mend the file") from None
    return value


def count(argument: str, value: object, least: int) -> None:
    """Refuse what is no whole number of at least so much."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise bad_type(argument, "a whole number", repr(value))
    if value < least:
        raise bad_value(argument, f"at least {least}", str(value))


def positive(argument: str, value: object) -> float:
    if (value := number(argument, value)) <= 0:
        raise bad_value(argument, "a number above 0", f"{value:g}")
    return value


def non_negative(argument: str, value: object) -> float:
    if (value := number(argument, value)) < 0:
        raise bad_value(argument, "a number not below 0", f"{value:g}")
    return value


def in_range(argument: str, value: object, low: float, high: float) -> float:
    """low <= value < high."""
    if not low <= (value := number(argument, value)) < high:
        raise bad_value(argument, f"a number in [{low:g}, {high:g})", f"{value:g}")
    return value


def is_tensor(argument: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        remedy = "pass its weight" if hasattr(value, "weight") else ""
        raise bad_type(argument, "a torch.Tensor", type(value).__name__, remedy)
    if type(value).__name__ == "DTensor":
        raise bad_type(argument, "a plain tensor", "a DTensor", f"pass {argument}.full_tensor()")
    # while a graph is traced, tensors are fake, and what they stand for is not
    if not torch.compiler.is_compiling():
        _has_numbers(argument, value)
    return value


_TELLS_BYTES = "for what a call takes, fusedpo.plan(...) tells the bytes"
_NUMBERS = "a tensor with numbers in it"


def _has_numbers(argument: str, value: Tensor) -> None:
    """Raise for a tensor that is not one number beside the other, or is more than numbers."""
    if type(value).__name__ == "FakeTensor":
        raise bad_type(argument, _NUMBERS, "a FakeTensor", _TELLS_BYTES)
    if value.is_nested:
        remedy = f"pad it, or pass {argument}.values() as packed rows with cu_seqlens"
        raise bad_type(argument, "a dense tensor", "a nested tensor", remedy)
    if value.layout is not torch.strided:
        remedy = f"pass {argument}.to_dense()"
        raise bad_type(argument, "a dense tensor", str(value.layout), remedy)
    if forward_ad._current_level >= 0 and _tangent(value) is not None:
        got = "one of forward-mode differentiation"
        raise bad_value(argument, "a tensor without a tangent", got, "use torch.autograd.grad")


def _tangent(value: Tensor) -> Tensor | None:
    """Its derivative in forward mode."""
    tangent: Tensor | None = forward_ad.unpack_dual(value).tangent  # type: ignore[no-untyped-call]
    return tangent


def not_transformed() -> None:
    """Raise inside a transform of ``torch.func``."""
    if torch.compiler.is_compiling():
        return
    transform = torch._C._functorch.peek_interpreter_stack()
    if transform is not None:
        raise bad_value(
            "torch.func",
            "a call outside of its transforms",
            f"one inside {transform.key().name.lower()}",
            "use torch.autograd.grad, and a loop or a larger batch instead of vmap",
        )


def floating(argument: str, value: object) -> Tensor:
    tensor = is_tensor(argument, value)
    if tensor.dtype not in FLOATS:
        raise bad_type(argument, f"one of {_dtypes(FLOATS)}", str(tensor.dtype))
    return tensor


def shaped(argument: str, value: Tensor, shape: Sequence[int], meaning: str) -> None:
    if tuple(value.shape) != tuple(shape):
        raise bad_value(argument, f"{meaning} {list(shape)}", str(list(value.shape)))


def same_device(**tensors: Tensor | torch.device | None) -> None:
    devices = {n: getattr(t, "device", t) for n, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        got = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(
            f"devices: expected all tensors on one device, got {got}; move them with .to(device)"
        )


def at_hand(argument: str, value: object, device: torch.device) -> Tensor:
    """A tensor on the CPU, from where it is copied, or on the device where it is needed."""
    tensor = is_tensor(argument, value)
    if tensor.device.type != "cpu" and tensor.device != device:
        expected = f"a tensor on {device} as hidden is, or on the CPU"
        raise bad_value(argument, expected, f"one on {tensor.device}", "move it with .to(device)")
    return tensor


def head_inputs(
    hidden: object, weight: object, bias: object, *, prefix: str = ""
) -> tuple[Tensor, Tensor]:
    """Types and shapes of hidden [..., H], weight [V, H], bias [V]."""
    not_transformed()
    hidden = floating(f"{prefix}hidden", hidden)
    weight = floating(f"{prefix}weight", weight)
    if weight.dim() != 2 or weight.numel() == 0:
        gather = "a sharded weight has to be gathered first, or run the loss by fusedpo.at_head"
        remedy = gather if weight.dim() == 1 or weight.numel() == 0 else ""
        raise bad_value(f"{prefix}weight", "[V, H], not empty", str(list(weight.shape)), remedy)
    if hidden.dim() < 2 or hidden.shape[-1] != weight.shape[1]:
        transposed = hidden.dim() >= 2 and hidden.shape[-1] == weight.shape[0]
        raise bad_value(
            f"{prefix}hidden",
            f"[..., H] with H = {weight.shape[1]} as in {prefix}weight {list(weight.shape)}",
            str(list(hidden.shape)),
            f"pass {prefix}weight.T, or states rather than logits" if transposed else "",
        )
    if bias is not None:
        bias = floating(f"{prefix}bias", bias)
        shaped(f"{prefix}bias", bias, (weight.shape[0],), "[V] =")
    same_device(**{f"{prefix}hidden": hidden, f"{prefix}weight": weight, f"{prefix}bias": bias})
    # after the devices, as all others' are this one, a reference's too
    if hidden.is_meta and not prefix and not torch.compiler.is_compiling():
        raise bad_type("hidden", _NUMBERS, "one on the meta device", _TELLS_BYTES)
    _same_dtype(prefix, hidden, weight, bias)
    return hidden, weight


def _same_dtype(prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    dtypes = {hidden.dtype, weight.dtype} | (set() if bias is None else {bias.dtype})
    if len(dtypes) == 1:
        return
    device = hidden.device.type
    # as torch.nn.Linear: autocast is what makes mixed dtypes meaningful
    if torch.is_autocast_enabled(device) and torch.float64 not in dtypes:
        return
    got = f"{hidden.dtype} with weight {weight.dtype}"
    got += "" if bias is None else f" and bias {bias.dtype}"
    raise bad_type(
        f"{prefix}hidden",
        "the dtype of weight and bias",
        got,
        "cast one of them, or use torch.autocast",
    )


def label_tensor(
    labels: object,
    hidden: Tensor,
    ignore_index: int,
    *,
    unshifted: str = "pass hidden[:, :-1] with labels[:, 1:]",
) -> Tensor:
    """labels [...], shaped like hidden without its last axis; their values are not looked at."""
    labels = is_tensor("labels", labels)
    if labels.dtype not in LABELS:
        got = str(labels.dtype)
        raise bad_type("labels", f"one of {_dtypes(LABELS)}", got, "pass labels.long()")
    expected = hidden.shape[:-1]
    if labels.shape != expected:
        off_by_one = (
            labels.dim() >= 1
            and labels.shape[:-1] == expected[:-1]
            and abs(labels.shape[-1] - expected[-1]) == 1
        )
        remedy = f"labels are not shifted here: {unshifted}" if off_by_one else ""
        raise bad_value(
            "labels",
            f"the shape of hidden without its last axis, {list(expected)}",
            str(list(labels.shape)),
            remedy,
        )
    same_device(hidden=hidden, labels=labels)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, Integral):
        raise bad_type("ignore_index", "an int", type(ignore_index).__name__)
    bounds = torch.iinfo(labels.dtype)
    if not bounds.min <= ignore_index <= bounds.max:
        raise bad_value(
            "ignore_index",
            f"a number that {_dtypes([labels.dtype])} labels can hold",
            str(ignore_index),
            "pass labels.long()" if labels.dtype == torch.int32 else "",
        )
    return labels


def outside_vocabulary(labels: Tensor, vocab: int, ignore_index: int) -> Tensor:
    """Shaped like labels: neither a class in [0, vocab) nor ignore_index."""
    return (labels != ignore_index) & ((labels < 0) | (labels >= vocab))


def bad_labels(labels: Tensor, vocab: int, ignore_index: int) -> ValueError:
    where = outside_vocabulary(labels, vocab, ignore_index).nonzero()[0].tolist()
    return bad_value(
        "labels",
        f"class numbers in [0, {vocab}) or ignore_index = {ignore_index}",
        f"{int(labels[tuple(where)])} at position {where}",
        "see that the tokenizer is the model's own, and that masked positions have ignore_index",
    )


def _dtypes(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


# what a backward is asked for


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The backward of an autograd function, which refuses to be recorded or batched.

    ``once_differentiable`` would not do: it raises only where an upstream gradient requires a
    gradient, so of all that is linear in the outputs a second derivative would lack its largest
    part, without a word.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *upstream: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph: expected False, as the gradients of fused losses cannot be "
                "differentiated, got True; second derivatives need the full logits, in plain "
                "PyTorch"
            )
        if any(_is_batched(t) for t in tree_leaves(upstream)):
            raise RuntimeError(
                "is_grads_batched: expected False, as the engine forms one gradient at a time, got "
                "True; call torch.autograd.grad once for each of grad_outputs"
            )
        return backward(ctx, *upstream)

    return checked


def _is_batched(value: Any) -> bool:
    """Whether this is a tensor of vmap's; autograd has an older one of its own."""
    functorch = torch._C._functorch
    return isinstance(value, Tensor) and (
        functorch.is_batchedtensor(value) or functorch.is_legacy_batchedtensor(value)
    )

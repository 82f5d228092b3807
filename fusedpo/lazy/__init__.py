"""Logits that are never made, for code that was never changed.

    fusedpo.lazy_logits(model)
    logits = model(input_ids, attention_mask=mask).logits[:, :-1] / temperature
    logps = logits.log_softmax(-1).gather(-1, labels[:, 1:, None]).squeeze(-1)
    loss = -(logps * response_mask[:, 1:]).sum()  # nothing was computed before

The head's call returns a ``LazyTensor``: a tensor of torch by shape, dtype, device and place in the
autograd graph, that holds the hidden states and the head. Operations on rows are done to the row
numbers (``shapes.py``), those along the vocabulary become an expression (``expressions.py``), and
one number a row is scored when somebody needs it: by the engine where it is a sum of its statistics
(``statistics.py``), else a few rows at a time (``source.py``). The rest makes the real logits, and
says so (``operations.py``).
"""

from fusedpo.lazy.install import LazyLogits, lazy_logits
from fusedpo.lazy.operations import LogitsNeeded
from fusedpo.lazy.tensor import LazyTensor

__all__ = ["LazyLogits", "LazyTensor", "LogitsNeeded", "lazy_logits"]

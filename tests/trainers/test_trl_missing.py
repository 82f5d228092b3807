"""Responses that truncation has cut away, through TRL's trainers of pairs: loss, gradient and
metrics are those of the batch without their pairs, and the trainer says so once."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

import tiny
from datasets import Dataset
from torch import Tensor
from trainers import trl_runs
from trainers.trl_runs import build, quiet

from fusedpo.trainers import trl as ours

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "cpo": ("cpo", {}),
    "cpo simpo": ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.0}),
    "cpo ipo": ("cpo", {"loss_type": "ipo"}),
    "orpo": ("orpo", {}),
    "tpo": ("tpo", {}),
    "tpo-l": ("tpo", {"loss_type": "tpo-l"}),
    "tpo without gold": ("tpo", {"tpo_alpha": 0.0}),
}
PAIRS = 3
WARNING = r"^batch: expected at least one token in every response, got 1 pairs with none in one of "


def batch_of(trainer: Any) -> dict[str, Any]:
    """Three pairs, of one length."""
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def cut(batch: dict[str, Any], row: int, side: str) -> dict[str, Any]:
    """The same, where nothing is left of a response."""
    batch = {name: v.clone() if isinstance(v, Tensor) else v for name, v in batch.items()}
    if "completion_mask" in batch:
        batch["completion_mask"][row + PAIRS * (side == "rejected")] = 0
    else:
        batch[f"{side}_labels"][row] = -100
    return batch


def without(batch: dict[str, Any], row: int) -> dict[str, Any]:
    """The same without a pair, and its gold response."""
    rest = {}
    for name, value in batch.items():
        kept = [i for i in range(len(value)) if i % PAIRS != row]
        rest[name] = value[kept] if isinstance(value, Tensor) else [value[i] for i in kept]
    return rest


def outcome(trainer: Any, batch: dict[str, Any]) -> tuple[float, Tensor, dict[str, float]]:
    """Loss, gradient of the head, metrics."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    records = trainer._metrics if hasattr(trainer, "_metrics") else trainer._stored_metrics
    metrics = {name: sum(map(float, v)) / len(v) for name, v in records["train"].items()}
    records["train"].clear()
    metrics.pop("num_tokens", None)
    return float(loss.detach()), trainer.model.lm_head.weight.grad.clone(), metrics


def trainer_of(method: str, make: Any = "llama", **options: Any) -> Any:
    made = build(method, make, per_device_train_batch_size=PAIRS, **options)
    made.model.train()
    return made


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize(("method", "options"), METHODS.values(), ids=METHODS)
def test_a_pair_without_a_response_is_left_out(method, options, side) -> None:
    with quiet():
        plain = trainer_of(method, **options)
        batch = batch_of(plain)
        loss, gradient, metrics = outcome(plain, without(batch, 1))
    with ours.patched(), quiet():
        subject = trainer_of(method, **options)
        with pytest.warns(UserWarning, match=WARNING):
            own = outcome(subject, cut(batch, 1, side))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = outcome(subject, cut(batch, 2, side))
        whole = outcome(subject, batch)
    assert own[2].pop("pairs/left_out") == 1 and again[2]["pairs/left_out"] == 2
    assert "pairs/left_out" not in whole[2]
    assert own[0] == pytest.approx(loss, rel=1e-5)
    assert float((own[1] - gradient).norm()) < 1e-4 * float(gradient.norm())
    assert own[2] == pytest.approx(metrics, rel=1e-4)
    # what a mean over three would give is far from that
    assert abs(2 / 3 * loss - loss) > 0.1 * abs(loss) and math.isfinite(loss)


@pytest.mark.parametrize("method", ["cpo", "orpo"])
def test_so_it_is_where_the_model_makes_its_own_logits(method) -> None:
    """And in the evaluation, whose record is another."""

    class Own(torch.nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden)

    def make() -> Any:
        model = trl_runs.model()
        model.lm_head.__class__ = Own
        return model

    with quiet():
        plain = trainer_of(method)
        batch = batch_of(plain)
        loss, gradient, _ = outcome(plain, without(batch, 1))
    with ours.patched(), quiet():
        subject = trainer_of(method, make)
        own = outcome(subject, cut(batch, 1, "chosen"))
        subject.model.eval()
        value, metrics = subject.get_batch_loss_metrics(
            subject.model, cut(batch, 1, "rejected"), train_eval="eval"
        )
    assert own[0] == pytest.approx(loss, rel=1e-5)
    assert float((own[1] - gradient).norm()) < 1e-4 * float(gradient.norm())
    assert float(value.detach()) == pytest.approx(loss, rel=1e-5)
    assert subject._stored_metrics["eval"]["eval_pairs/left_out"] == [1]
    assert all(map(math.isfinite, metrics.values()))


@pytest.mark.parametrize("method", ["cpo", "orpo", "tpo"])
def test_a_batch_of_none_but_such_pairs_adds_nothing(method) -> None:
    with ours.patched(), quiet():
        subject = trainer_of(method)
        batch = batch_of(subject)
        none = batch
        for row in range(PAIRS):
            none = cut(none, row, "rejected")
        loss, gradient, metrics = outcome(subject, none)
        after = outcome(subject, batch)
    assert loss == 0 and not gradient.any()
    assert all(map(math.isfinite, metrics.values())) and metrics["pairs/left_out"] == PAIRS
    assert not [name for name in metrics if name.startswith(("rewards/", "logps/"))]
    assert math.isfinite(after[0]) and after[1].any()


@pytest.mark.parametrize("method", ["cpo", "orpo"])
def test_a_prompt_that_fills_the_length_trains_as_if_its_row_were_not_there(method) -> None:
    """The whole way: TRL cuts the response away, the log has numbers, and a sum of pairs."""
    rows = [dict(row) for row in trl_runs.rows(6)]
    rows[2]["prompt"] = "sun " * 40
    with ours.patched(), quiet(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer, config = trl_runs.classes(method)
        args = config(
            trl_runs.scratch(),
            max_length=32,
            max_steps=2,
            per_device_train_batch_size=PAIRS,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        )
        subject = trainer(
            model=trl_runs.model(),
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tiny.tokenizer(),
        )
        subject.train()
    logs = subject.state.log_history[:2]
    for log in logs:
        assert all(math.isfinite(v) for v in log.values()) and log["loss"] > 0
        assert log["grad_norm"] > 0
    assert [log["pairs/left_out"] for log in logs if "pairs/left_out" in log] == [1]
    assert sum("expected at least one token" in str(w.message) for w in caught) == 1


def worker(rank: int, folder: str) -> None:
    """One pair of the first process is missing, and all of the second."""
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": Path(folder, "port").read_text()}
    torch.set_num_threads(1)
    found = {}
    with ours.patched(), quiet():
        for method in ("cpo", "orpo", "tpo"):
            subject = trainer_of(method, ddp_backend="gloo")
            batch = batch_of(subject)
            for row in range(PAIRS) if rank else (1,):
                batch = cut(batch, row, "chosen")
            found[method] = (*outcome(subject, batch), without(batch, 1))
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_gather_as_many_numbers(tmp_path) -> None:
    """Else the one would wait for the other. Metrics are those of the pairs that there are."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    torch.multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for method in first:
        loss, gradient, metrics, kept = first[method]
        with quiet():
            expected = outcome(trainer_of(method), kept)
        assert loss == pytest.approx(expected[0], rel=1e-5)
        assert float((gradient - expected[1]).norm()) < 1e-4 * float(expected[1].norm())
        assert second[method][0] == 0 and not second[method][1].any()
        assert metrics.pop("pairs/left_out") == 1 + PAIRS
        pairwise = {n: v for n, v in metrics.items() if n.startswith(("rewards/", "logps/"))}
        assert len(pairwise) == 6
        assert pairwise == pytest.approx({n: expected[2][n] for n in pairwise}, rel=1e-4)
        assert {n: second[method][2][n] for n in pairwise} == pairwise

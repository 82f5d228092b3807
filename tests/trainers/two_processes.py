"""One training step on two processes; run by test_transformers.py through torch.distributed.run."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
import torch
from test_transformers import parameters, trainer

from fusedpo.losses import SimPO

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    model = tiny.model()
    start = parameters(model)
    subject = trainer(
        folder,
        model,
        SimPO(sft_weight=0.3),
        tiny.token_rows(8),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        ddp_backend="gloo",
    )
    subject.train()
    if os.environ["RANK"] == "0":
        torch.save(parameters(model) - start, folder / "update.pt")
        log = next(entry for entry in subject.state.log_history if "loss" in entry)
        (folder / "log.json").write_text(json.dumps(log))
    # the second process has more groups of lengths than the first
    model = tiny.model()
    rows = tiny.token_rows(8)
    for row in rows[4:6]:
        row["prompt_ids"] = row["prompt_ids"][-1:]
    one = {"per_device_train_batch_size": 4, "ddp_backend": "gloo"}
    trainer(folder, model, rows=rows, length_groups=True, **one).train()
    if os.environ["RANK"] == "0":
        torch.save(parameters(model) - start, folder / "grouped.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()

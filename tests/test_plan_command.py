"""``fusedpo plan``: what it prints, its JSON, and one clear line for every mistake."""

from __future__ import annotations

import argparse
import json
import shlex
import sys

import pytest
import torch

from fusedpo import devices
from fusedpo.benchmarks import peer_memory
from fusedpo.commands import plan as command
from fusedpo.devices import Device

BIG = "--model llama-3.1-8b --tokens 32768 --pairs 4 --budget 1GiB --device cuda"


def run(line: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(shlex.split(line)))


def answer(line: str, capsys) -> dict:
    """The JSON object, which is all that is on stdout."""
    assert run(f"{line} --json") == 0
    return json.loads(capsys.readouterr().out)


def test_the_tables_have_routes_outputs_and_other_programs(capsys) -> None:
    assert run(BIG) == 0
    text = capsys.readouterr().out
    assert "simpo on llama-3.1-8b (V 128256, H 4096): 262144 scored tokens" in text
    assert "recompute is the cheapest that fits, 4 products; one_pass takes 3 with 4.25 GiB" in text
    for word in ("recompute (chosen)", "retain", "gradient of the head", *peer_memory.PEERS):
        assert word in text


def test_the_tables_are_plain_without_rich(capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert run(f"{BIG} --fit 80GiB") == 0
    text = capsys.readouterr().out
    assert text.isascii()
    assert any(line.split()[:3] == ["recompute", "(chosen)", "4"] for line in text.splitlines())


def test_json_has_bytes(capsys) -> None:
    found = answer(f"{BIG} --fit 80GiB", capsys)
    assert (found["chosen"], found["scored_tokens"], found["budget"]) == ("recompute", 2**18, 2**30)
    for cost in found["routes"].values():
        assert cost["bytes"] == sum(cost["buffers"].values())
        assert cost["fits"] is (cost["bytes"] <= 2**30)
    assert found["outputs"]["gradient of the head"] == 2 * 128_256 * 4096
    assert sum(found["peers"]["full logits, PyTorch"].values()) == 12 * 2**18 * 128_256
    fit = found["fit"]
    assert fit["memory"] == 80 * 2**30 >= sum(fit["breakdown"].values())
    assert all(fit["fits"] > other for other in fit["peers"].values())


def test_the_default_budget_goes_by_the_device(capsys) -> None:
    model = "--model llama-3.1-8b --tokens 4096"
    assert answer(f"{model} --device cpu", capsys)["budget"] == 2**28
    assert answer(f"{model} --device-memory 80GB", capsys)["budget"] == 24 * 10**8
    assert answer(f"{model} --device-memory 80GB --budget 1GiB", capsys)["budget"] == 2**30
    assert run(f"{model} --device-memory 192GB") == 0
    assert "with a budget of 4 GiB" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"^--device-memory: expected a GPU, got cpu"):
        run(f"{model} --device cpu --device-memory 80GB")


PLANNED = {
    # is there a GPU; the options; device, its budget, and what is said of it
    (False, ""): (
        "cpu",
        2**28,
        "the CPU, as there is no GPU here (--device cuda plans for one), with its default budget "
        "of 256 MiB",
    ),
    (True, ""): ("cuda", 3 * 10**9, "a GPU of 93.13 GiB, with its default budget of 2.794 GiB"),
    (True, "--device cpu"): ("cpu", 2**28, "the CPU, with its default budget of 256 MiB"),
    (False, "--device cpu --budget 1GiB"): ("cpu", 2**30, "the CPU"),
    (False, "--device-memory 80GB --budget 1GiB"): ("cuda", 2**30, "a GPU of 74.51 GiB"),
    (False, "--device cuda"): (
        "cuda",
        2**28,
        "a GPU of a memory that is not known (--device-memory tells it), with its default budget "
        "of 256 MiB",
    ),
}


@pytest.mark.parametrize(("gpu", "more"), PLANNED, ids=str)
def test_it_says_what_it_plans_for(gpu, more, capsys, monkeypatch) -> None:
    """This machine, unless another is named."""
    here = Device("cuda", 10**11, 132) if gpu else Device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(devices, "_gpu", lambda index: here)
    device, budget, said = PLANNED[gpu, more]
    line = f"--model gpt2 --tokens 64 {more}"
    found = answer(line, capsys)
    assert (found["device"], found["budget"]) == (device, budget)
    assert run(line) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.endswith(f"; bfloat16, {device}, {'triton' if device == 'cuda' else 'torch'}")
    assert second == f"Planned for {said}."


def test_a_gradient_tolerance_has_its_route(capsys) -> None:
    line = "--model gemma-2-2b --tokens 8192 --budget 4GiB --device cuda"
    exact, within = answer(line, capsys), answer(f"{line} --gradient-tolerance 2e-3", capsys)
    assert "compact" not in exact["routes"]
    assert within["chosen"] == "compact"
    assert 1 < within["routes"]["compact"]["products"] < 3
    within["routes"].pop("compact")
    assert within == {**exact, "chosen": "compact"}
    assert run(f"{line} --gradient-tolerance 2e-3") == 0
    text = capsys.readouterr().out
    assert "compact (chosen)" in text and "compact's products are for 15% of the columns" in text
    assert run(line) == 0
    assert "compact" not in capsys.readouterr().out
    refused = r"^--gradient-tolerance: expected 0"
    with pytest.raises(ValueError, match=refused):
        run(f"{line} --gradient-tolerance 2")
    with pytest.raises(ValueError, match=f"{refused} in double precision"):
        run(f"{line} --gradient-tolerance 2e-3 --dtype float64")


def test_a_prompt_costs_full_logits_only(capsys) -> None:
    """But for the gradient of its hidden states, which is an output."""
    bare, prompted = (
        answer(f"--model gpt2 --tokens 100 --context {n} --device cpu", capsys) for n in (1, 1000)
    )
    assert bare["routes"] == prompted["routes"]
    peer = "full logits, PyTorch"
    assert sum(prompted["peers"][peer].values()) > 10 * sum(bare["peers"][peer].values())


def test_adapters_share_the_reference(capsys) -> None:
    model = "--model qwen2.5-7b --fit 80GB --device cuda"
    whole, frozen = (
        answer(f"{model} --loss dpo {more}", capsys)["fit"] for more in ("", "--frozen")
    )
    assert frozen["fits"] > 10 * whole["fits"]
    assert whole["breakdown"]["reference model"] and not frozen["breakdown"]["reference model"]


def test_nothing_fits_is_an_answer(capsys) -> None:
    assert run("--model llama-3.1-8b --fit 1GiB") == 0
    assert "Nothing fits: one token takes more than 1 GiB" in capsys.readouterr().out
    assert answer("--model llama-3.1-8b --fit 1GiB", capsys)["fit"]["fits"] is None


def test_a_softcap_rules_liger_out(capsys) -> None:
    found = answer("--model gemma-2-2b --fit 80GiB --device cuda", capsys)
    assert found["peers"]["Liger 0.8.5, by pair, eager"] is None
    assert found["fit"]["peers"]["Liger 0.8.5, by pair, eager"] is None


@pytest.mark.parametrize("more", ["", "--json"])
def test_a_budget_that_is_too_small_names_the_least_after_the_routes(more, capsys) -> None:
    with pytest.raises(
        ValueError, match=r"--budget: expected at least .* \(\d+ bytes\)"
    ) as refusal:
        run(f"--model gpt2 --budget 20KiB {more}")
    text = capsys.readouterr().out
    assert "retain" in text
    least = int(str(refusal.value).split("(")[1].split(" bytes")[0])
    assert answer(f"--model gpt2 --budget {least}", capsys)["chosen"] == "recompute"


@pytest.mark.parametrize("line", command.EXAMPLES.split("\n    ")[1:])
def test_the_examples_run(line, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 64, "vocab_size": 1000}))
    words = line.split("\n")[0].removeprefix("fusedpo plan ")
    assert run(words) == 0 and capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--model gpt2 --tokens 0", "--tokens: expected a whole number of at least 1, got 0"),
        ("--model gpt2 --pairs -1", "--pairs: expected a whole number of at least 1, got -1"),
        ("--model gpt2 --context -1", "--context: expected a whole number of at least 0"),
        (
            "--model gpt2 --tokens 99999999999999999999",
            "--tokens: expected a .* of at most 1000000",
        ),
        ("--model gpt2 --pairs 1000000", "--pairs: expected a whole number of at most 10000"),
        ("--hidden 0 --vocab 10", "--hidden: expected a whole number of at least 1"),
        ("--model gpt2 --budget lots", "--budget: expected a number of bytes or a text with"),
        ("--model gpt2 --fit lots", "--fit: expected a number of bytes or a text with"),
        ("--model gpt2 --loss simpoo", "--loss: expected one of .*did you mean 'simpo'"),
        ("--model gpt3x.json", "--model: expected a folder with config.json"),
        ("--model=", "--model: expected a folder with config.json, .* got ''"),
        ("", "--model: expected either --model, or --hidden and --vocab, got none of them"),
        ("--hidden 8", "--model: expected either .* got --hidden"),
        ("--model gpt2 --vocab 8", "--model: expected either .* got --model and --vocab"),
        ("--hidden 8 --vocab 8 --fit 1GiB", "--fit: expected a dense model whose layers"),
        ("--model gpt2 --device cpu --backend triton", "--backend: expected torch on the CPU"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_printed(line, said, capsys) -> None:
    with pytest.raises(ValueError, match=said):
        run(line)
    assert not capsys.readouterr().out


def test_float64_goes_to_torch(capsys) -> None:
    assert run("--model gpt2 --tokens 64 --dtype float64 --device cuda") == 0
    assert "; float64, cuda, torch\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--backend: expected torch on the CPU and for float64"):
        run("--model gpt2 --dtype float64 --backend triton")


def test_a_route_that_is_as_dear_is_not_called_cheaper() -> None:
    costs = {name: {"products": 4, "needed_budget": 2**20} for name in ("retain", "recompute")}
    assert command._why(costs, "recompute") == "recompute is the cheapest that fits, 4 products."
    costs["one_pass"] = {"products": 3, "needed_budget": 2**21}
    assert command._why(costs, "recompute").endswith("; one_pass takes 3 with 2 MiB.")

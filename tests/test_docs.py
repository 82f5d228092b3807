"""The code in docs/ runs, and what the text says of it is true; TRL's scripts there differ from
TRL's own by one line, and not in their numbers."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import guide_runs
import pytest
import tiny
import torch
from losses.test_a_new_loss import shared_checks
from losses.test_a_new_loss import (
    test_it_passes_what_every_loss_passes as passes_what_every_loss_passes,
)
from repository import ROOT, files
from torch import Tensor

import fusedpo
from fusedpo import losses
from fusedpo.losses import PolicyLoss, base
from fusedpo.trainers import methods

pytest.importorskip("trl")

PAGE = "docs/trainers.md"
OURS = re.compile(r"^from fusedpo\.trainers\.trl import Fused(\w+) as \1 .*$", re.MULTILINE)
SETTINGS = {
    "max_steps": 3,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
}
FIRST_TRAINER = {"DPOTrainer": "trl", "CPOTrainer": "trl.experimental.cpo"}


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, language: str = "python") -> list[str]:
    """What is fenced off in this language; "" for shell lines."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [body for of, body in fences if of == language]


BLOCKS = blocks(page(PAGE))
SCRIPTS = [block for block in BLOCKS if OURS.search(block)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny.save(tmp_path_factory.mktemp("docs"), max_position_embeddings=128)
    with (made / "pairs.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in tiny.text_rows(8))
    return made


def run(source: str, folder: Path, out: Path) -> dict[str, Any]:
    """With a small model and dataset in the place of those that are named."""
    data = f'load_dataset("json", data_files="{folder / "pairs.jsonl"}", split="train")'
    source = source.replace("Qwen/Qwen3-0.6B", str(folder))
    source = re.sub(r'load_dataset\("trl-lib[^)]*\)', data, source)
    source = re.sub(r'(Config|Arguments)\("out"', rf'\1("{out}", **SETTINGS', source)
    names: dict[str, Any] = {"SETTINGS": SETTINGS, "__name__": "docs"}
    torch.manual_seed(0)
    exec(compile(source, PAGE, "exec"), names)
    return names


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    from fusedpo.trainers.trl import unpatch

    yield
    unpatch()


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_code_runs(number: int, folder: Path, tmp_path: Path) -> None:
    names = run(BLOCKS[number], folder, tmp_path)
    if "losses" in names:  # the hand-written loop
        assert len(names["losses"]) == 4
        # half a step's pairs each, and nothing learned before the first step
        assert names["losses"][0] == pytest.approx(0.5 * torch.log(torch.tensor(2.0)).item())
        assert names["losses"][-1] < names["losses"][0]


def test_there_is_a_script_for_each() -> None:
    found = [OURS.search(script)[1] for script in SCRIPTS]  # type: ignore[index]
    assert found == list(FIRST_TRAINER)


@pytest.mark.parametrize("script", SCRIPTS, ids=list(FIRST_TRAINER))
def test_scripts_differ_from_trls_by_one_line(script: str, folder: Path, tmp_path: Path) -> None:
    name = OURS.search(script)[1]  # type: ignore[index]
    plain = OURS.sub(f"from {FIRST_TRAINER[name]} import {name}", script)
    assert "fusedpo" not in plain
    changed = [a for a, b in zip(script.splitlines(), plain.splitlines(), strict=True) if a != b]
    assert len(changed) == 1
    ours, theirs = (
        run(source, folder, tmp_path)["trainer"].state.log_history for source in (script, plain)
    )
    assert len(ours) == 4
    for own, other in zip(ours, theirs, strict=True):
        assert own.keys() == other.keys()
        for key in own:
            if not any(word in key for word in ("runtime", "per_second", "accuracies")):
                assert own[key] == pytest.approx(other[key], rel=2e-4, abs=2e-4), key


# the guide

GUIDE = "docs/guide.md"
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", page(GUIDE), re.MULTILINE | re.DOTALL))
DISTRIBUTED = "Distributed"
LOSS_FILE = "Savage"
PAGES = [
    *("README.md", "CONTRIBUTING.md", "SECURITY.md"),
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]


def tables(section: str, heading: str) -> list[list[str]]:
    """The rows of all tables of a section whose first column is called so."""
    found: list[list[str]] = []
    taking = False
    for line in SECTIONS[section].splitlines():
        # a bar within code is none between cells
        cells = [cell.strip() for cell in re.split(r"\|(?=(?:[^`]*`[^`]*`)*[^`]*$)", line)[1:-1]]
        if not cells:
            taking = False
        elif taking and not set(cells[0]) <= set("-"):
            found.append(cells)
        taking = taking or cells[:1] == [heading]
    return found


def code(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


@pytest.fixture
def names(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the code of the section that is asked for defines, run in order as one script."""
    module = ModuleType("guide_script")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks(SECTIONS[request.param]):
        exec(compile(block, GUIDE, "exec", dont_inherit=True), vars(module))
    return vars(module)


def of_section(title: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("names", [title], indirect=True, ids=[title])


def naive(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each token by full logits in float64, 0 where ignored; and lengths."""
    logp = (hidden.double() @ weight.double().T).log_softmax(-1)
    logp = logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0].detach()
    return logp.masked_fill(labels < 0, 0), (labels >= 0).sum(1)


def test_the_readme_is_one_screen() -> None:
    assert len(page("README.md").splitlines()) <= 80
    assert page("README.md").index("make demo") < page("README.md").index("make test") < 250


def test_losses_add_up_and_are_changed() -> None:
    (source,) = blocks(page("docs/losses.md"))
    names: dict[str, Any] = {}
    exec(source, names)
    assert "BCO" in repr(names["mixture"]) and "SimPO" in repr(names["weighted"])


@of_section("Choosing a loss")
def test_choosing_a_loss(names: dict[str, Any]) -> None:
    """Each call of the section against its formula."""
    tokens, length = naive(*names["given"])
    delta = tokens - names["reference"].double()
    mean, ratio = tokens.sum(1) / length, delta.sum(1)
    sigmoid, log_sigmoid = torch.sigmoid, torch.nn.functional.logsigmoid
    w, l = ratio.chunk(2)
    short_w, short_l, long_w = (2.0 * mean).chunk(3)
    sign = names["liked"] * 2.0 - 1.0
    aim_w, aim_l = 1e3 * (torch.tensor([0.8, 0.6, 0.9]).double() - 0.5), 1e3 * (0.2 - 0.5)
    advantages = names["advantages"].double()
    tau = torch.full_like(advantages, 1.05).masked_fill(advantages > 0, 1.0)[:, None]
    gated = (torch.atan(tau * delta) / tau).sum(1) / length
    truth = {
        "three_pairs": -log_sigmoid(2.0 * (mean[:3] - mean[3:]) - 0.5),
        "with_reference": -log_sigmoid(0.1 * (w - l)),
        "six_responses": 1 - sigmoid(0.1 * sign * ratio),
        "three_games": 0.5 * ((w - aim_w) ** 2 + (l - aim_l) ** 2),
        "two_triples": -log_sigmoid(short_w - short_l - 0.5) + (short_w - long_w).abs(),
        "two_groups": -advantages * gated.exp(),
    }
    (row,) = names["rows"]
    assert (row["chosen"], row["rejected"]) == ("Paris.", "Lyon.")
    assert names["win_rates"].tolist() == pytest.approx([2.2 / 3, 1.6 / 3, 0.7 / 3], rel=1e-12)
    for name, value in truth.items():
        assert names[name].loss.item() == pytest.approx(value.mean().item(), rel=1e-5), name


@of_section("Choosing a budget")
def test_choosing_a_budget(names: dict[str, Any]) -> None:
    assert names["enough"].route in ("retain", "one_pass")
    # more has no effect, and less is another route
    more = fusedpo.plan(**names["sizes"], **names["pairs"], budget="64GiB")
    assert (more.route, more.bytes) == (names["enough"].route, names["enough"].bytes)
    sizes = {**names["sizes"], **names["pairs"]}
    assert fusedpo.plan(**sizes, budget=names["least"]).bytes <= names["least"]
    with pytest.raises(ValueError, match="memory_budget"):
        fusedpo.plan(**sizes, budget=names["least"] - 1)
    for options in ({"entropy": True}, {"scope": "batch"}):
        assert fusedpo.plan(**{**sizes, **options}).route == "recompute"
    assert fusedpo.plan(**sizes, entropy=True, budget="64GiB").route == "recompute"
    assert fusedpo.plan(**{**sizes, "scope": "batch"}, budget="64GiB").route == "retain"


@of_section("Reading the metrics")
def test_reading_the_metrics(names: dict[str, Any]) -> None:
    """What its text says beside its code."""
    given, same = names["given"], names["same"]
    assert names["fallen"]["logps/chosen"] < names["moved"][:2].mean()
    one, half = (fusedpo.preference_loss(losses.SimPO(), *given, num_items=n) for n in (2, 4))
    assert half.loss == one.loss / 2 and half.metrics == one.metrics
    mixed = fusedpo.preference_loss(0.5 * losses.SimPO() + losses.SFT(), *given).metrics
    assert mixed["rewards/margins"] == one.metrics["rewards/margins"]
    kto = fusedpo.preference_loss(
        losses.KTO(), *given, ref_logprobs=same, desirable=torch.ones(4), kl=0.0
    )
    assert kto.metrics["rewards/rejected"].isnan() and kto.loss.isfinite()


def test_what_is_clipped_has_no_gradient_but_for_cispo() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 1, 8, requires_grad=True)
    given = hidden, torch.randn(11, 8), torch.randint(11, (2, 1))
    # far above the range with a positive advantage, far below it with a negative one
    old = fusedpo.linear_logprobs(*given).detach() + torch.tensor([[-2.0], [2.0]])
    options = {"advantages": torch.tensor([1.0, -1.0]), "old_logprobs": old}
    clipped = fusedpo.policy_loss(losses.GRPO(), *given, **options)
    shares = [clipped.metrics[f"clip_ratio/{n}_mean"].item() for n in ("low", "high", "region")]
    assert shares == [0.5, 0.5, 1.0]
    assert not torch.autograd.grad(clipped.loss, hidden)[0].any()
    capped = fusedpo.policy_loss(losses.CISPO(epsilon_high=2.0), *given, **options)
    assert capped.metrics["cispo_clip_ratio"] == 0.5
    assert torch.autograd.grad(capped.loss, hidden)[0].abs().amax(2).min() > 0


@of_section("TRL")
def test_trl(names: dict[str, Any]) -> None:
    from trl import DPOTrainer

    assert issubclass(names["DPOTrainer"], DPOTrainer)


@of_section("Plain PyTorch")
def test_plain_pytorch(names: dict[str, Any]) -> None:
    assert names["losses"][0] == pytest.approx(math.log(2.0), rel=1e-6)
    assert names["losses"] == sorted(names["losses"], reverse=True)
    assert names["mixed"] == pytest.approx(names["losses"][-1], rel=0.1)
    assert names["steps"][-1] < names["steps"][0]
    # the first step of the module's, by full logits
    torch.manual_seed(1)
    made = names["Tiny"]()
    tokens, length = naive(made(names["inputs"]["input_ids"]), made.head.weight, names["aligned"])
    mean = tokens.sum(1) / length
    truth = -torch.nn.functional.logsigmoid(2.0 * (mean[:8] - mean[8:]) - 0.5).mean()
    got = names["fused"](made(names["inputs"]["input_ids"]), made.head.weight, names["aligned"])
    assert got.loss.item() == pytest.approx(truth.item(), rel=1e-5)


@pytest.mark.xdist_group("sharded")
def test_distributed() -> None:
    """As one script, on two processes; what it asserts, both assert."""
    guide_runs.start("\n".join(blocks(SECTIONS[DISTRIBUTED])), 2)


def test_a_failing_process_is_noticed() -> None:
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="on the second"):
        guide_runs.start("import os\nassert os.environ['RANK'] != '1', 'on the second'", 2)


@of_section("Adding a loss")
def test_adding_a_loss(
    names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file alone, where losses are found, has what the tests of every loss ask for."""
    (source,) = (b for b in blocks(SECTIONS["Adding a loss"]) if f"class {LOSS_FILE}" in b)
    assert len(source.splitlines()) <= 40
    (tmp_path / "savage.py").write_text(source)
    monkeypatch.setattr(losses, "__path__", [*losses.__path__, str(tmp_path)])
    monkeypatch.setattr(losses, LOSS_FILE, losses.available()["savage"], raising=False)
    loss = losses.get("savage", beta=0.2)
    assert loss.beta == 0.2 and type(loss).__module__ == "fusedpo.losses.savage"
    for name in shared_checks():
        passes_what_every_loss_passes(losses.get("savage"), name)
    monkeypatch.delitem(sys.modules, "fusedpo.losses.savage")
    monkeypatch.delattr(losses, "savage")


def test_bases_are_where_the_guide_says() -> None:
    rows = tables("Adding a loss", "base (in `fusedpo.losses.base`)")
    bases = [name for cells in rows for name in code(cells[0])]
    assert len(bases) == 6
    for name in bases:
        assert name in base.__all__ and issubclass(getattr(base, name), losses.Loss)


def test_every_section_is_run() -> None:
    run_here = {
        "Choosing a loss",
        "Choosing a budget",
        "Reading the metrics",
        "Adding a loss",
        "TRL",
        "Plain PyTorch",
        DISTRIBUTED,
    }
    assert set(SECTIONS) == run_here
    assert all(blocks(body) for body in SECTIONS.values())


DEFAULTS = [text for cells in tables("Choosing a loss", "defaults") for text in code(cells[0])]


@pytest.mark.parametrize("text", DEFAULTS)
def test_defaults_are_those_of_the_losses(text: str) -> None:
    loss = eval(text, vars(losses).copy())
    assert loss == type(loss)()


def test_every_loss_is_in_the_tables() -> None:
    listed = {text.partition("(")[0] for text in DEFAULTS}
    assert listed == {cls.__name__ for cls in losses.available().values()}
    assert "`SFT()`" in SECTIONS["Choosing a loss"]


def test_names_that_collide() -> None:
    assert isinstance(losses.get("sapo"), losses.SoftAdaptive)
    assert isinstance(losses.get("sspo"), losses.SoftSequence)
    assert isinstance(losses.get("sppo"), losses.SPPO)


def logged() -> set[str]:
    """The metrics of every loss, and of a few settings that add some."""
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(6, 5, 8), torch.randn(11, 8), torch.randint(11, (6, 5))
    reference = fusedpo.linear_logprobs(hidden, weight, labels)
    more = {"desirable": torch.tensor([1.0, 0.0] * 3), "kl": 0.0}
    advantages = torch.linspace(-1, 1, 6)
    found: set[str] = set()
    kinds = [cls() for cls in losses.available().values()]
    for loss in [*kinds, losses.GRPO(kl_weight=0.1, entropy_bonus=0.1)]:
        options: dict[str, Any] = {"ref_logprobs": reference} if loss.needs_reference else {}
        if isinstance(loss, PolicyLoss):
            options |= {"advantages": advantages, "old_logprobs": reference}
            out = fusedpo.policy_loss(loss, hidden, weight, labels, **options)
        else:
            options |= {name: value for name, value in more.items() if name in loss.inputs}
            out = fusedpo.preference_loss(loss, hidden, weight, labels, **options)
        found |= set(out.metrics)
    trained = hidden.requires_grad_()
    out = fusedpo.preference_loss(losses.SimPO(), trained, weight, labels, gradient_tolerance=1e-2)
    return found | set(out.metrics)


def test_every_metric_is_explained() -> None:
    explained = [key for cells in tables("Reading the metrics", "metric") for key in code(cells[0])]
    assert set(explained) == logged()
    (added,) = re.findall(r"^What the trainers add.*?\n\n", page(GUIDE), re.M | re.S)
    every = [methods.Pairs, *methods.Pairs.__subclasses__()]
    shown = {signal.key.removeprefix("eval_") for method in every for signal in method.signals}
    assert shown <= {*explained, *code(added)}


COMMANDS = {"train", "evaluate", "losses", "plan", "run", "bench", "doctor", "env"}
# a name that stands for others, and what has its options
STAND_INS = {"NAME": "simpo"}


def command_lines() -> list[str]:
    """Everything in code that calls the command, on any page."""
    found = []
    for name in PAGES:
        text = page(name)
        lines = [line for block in blocks(text, "") for line in block.splitlines()]
        outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        for line in [*lines, *(" ".join(span.split()) for span in code(outside))]:
            called = re.search(r"(?:^|-m )(fusedpo (?!\.)[^#]*)", line)
            if called:
                found.append(called[1].strip())
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("line", command_lines())
def test_commands_are_there(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    from fusedpo import cli

    command = line.split()[1]
    assert command in COMMANDS
    if command == "run":  # the rest are options of another program
        line = "".join(re.findall(r"^fusedpo run((?: --[a-z-]+(?:=| )\S+)*)", line))
    options = re.findall(r"(?<![\w-])--[a-z][a-z-]*", line)
    words = [command]
    if named := re.search(r"--loss (\S+)", line):
        words += ["--loss", STAND_INS.get(named[1], named[1])]
    with pytest.raises(SystemExit) as left:
        cli.main([*words, "--help"])
    assert left.value.code == 0
    offered = re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out)
    assert set(options) <= set(offered)


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


MARKDOWN = [path.as_posix() for path in files() if path.suffix == ".md"]


def links(text: str) -> list[str]:
    """Targets of links and pictures, but for those in code."""
    text = re.sub(r"^```.*?^```$|`[^`\n]+`", "", text, flags=re.M | re.S)
    return re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("name", MARKDOWN)
def test_links_lead_somewhere(name: str) -> None:
    for target in links(page(name)):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        path = ((ROOT / name).parent / file).resolve() if file else ROOT / name
        assert path.exists() and path.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), target


def test_every_page_is_looked_at() -> None:
    assert {"CHANGELOG.md", *PAGES} < set(MARKDOWN)
    assert links("[a `b`](c.md) `[d](e)` ![f](g.png)\n```\n[h](i)\n```\n") == ["c.md", "g.png"]

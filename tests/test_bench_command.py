"""``fusedpo bench``: what a person types, and what comes of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from repository import heed_interrupts

from fusedpo.cli import COMMANDS, main

on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
TINY = ["--quick", "--no-verify", "--seconds", "0.01", "--threads", "1", "--losses", "simpo"]
PEERS = ["--peers", "full_logits", "fusedpo"]


@on_linux
def test_a_question_is_answered_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "length", *TINY, *PEERS, "--shapes", "32,16,300", "64,16,300"]
    assert main([*arguments, "--json", "--output", str(tmp_path)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [(r["entry"], r["x"]) for r in answer["rows"]] == [
        (entry, x)
        for x in (32, 64)
        for entry in ("full logits", "fusedpo, 16 MiB", "fusedpo, 256 MiB")
    ]
    assert not any(r["missing"] for r in answer["rows"])
    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text())["length"] == answer
    assert {path.name for path in tmp_path.iterdir()} == {file.name, "length.png"}


@on_linux
@pytest.mark.parametrize("interrupt", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_half_written_file(tmp_path: Path, interrupt: int) -> None:
    # far too long to end by itself
    arguments = ["bench", "length", *TINY, *PEERS, "--shapes", "65536,256,32000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fusedpo", *arguments, "--output", str(tmp_path / "out")],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=heed_interrupts,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 60
    while not children.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    measuring = [int(child) for child in children.read_text().split()]
    assert measuring, "nothing was being measured"
    time.sleep(1.0)
    process.send_signal(interrupt)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (130 if interrupt == signal.SIGINT else 128 + interrupt)
    assert "Traceback" not in said
    if interrupt == signal.SIGINT:
        *steps, last = said.splitlines()
        assert last == "fusedpo bench: interrupted; no incomplete output was left"
        assert all(step.startswith("[") for step in steps)
    assert not list(tmp_path.rglob("*.*"))
    for child in measuring:
        assert not Path(f"/proc/{child}").exists(), "a measuring process goes on"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lenght"], "did you mean 'length'?"),
        (["length", "--shapes", "1024,gpt3"], "--shapes: expected N,H,V or N,MODEL"),
        (["length", "--shapes", "1023,16,300"], "multiple of 4"),
        (["length", "--device", "gpu"], "--device: expected cpu or cuda, got 'gpu'"),
        (["length", "--seconds", "0"], "--seconds: expected a positive number"),
        (["length", "--threads", "0"], "--threads: expected at least 1"),
        (["length", "--dtypo", "x"], "unknown argument --dtypo; did you mean --dtype"),
        (["length", "--peers", "nobody"], ", got 'nobody'"),
    ],
)
def test_what_cannot_be_done_is_said_before_any_work(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    from fusedpo.benchmarks import questions

    monkeypatch.setattr(questions, "ask", lambda *_, **__: pytest.fail("work was begun"))
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fusedpo bench: error: ") and said in error
    assert len(error.splitlines()) == 1


def test_what_is_wrong_is_not_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusedpo.benchmarks import questions

    monkeypatch.setattr(questions, "TESTS", ("tests/test_bench_command.py::no_such_test",))
    monkeypatch.setattr(questions, "question", lambda name: pytest.fail("it was measured"))
    assert main(["bench", "length", "--quick"]) == 1
    assert "nothing is measured" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert f"fusedpo {command}" in shown.partition("example")[2]

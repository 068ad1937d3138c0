"""`surgery ask`: a checkpoint answers a question.

surgery ask runs/quickstart/moe_64 "What is the capital of France?"
"""

from __future__ import annotations

import click

from surgery.cli.command import Command
from surgery.cli.terminal import say


@click.command("ask", cls=Command)
@click.argument("path", type=click.Path())
@click.argument("question")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True, help="Longest answer.")
def ask_command(path: str, question: str, max_new_tokens: int) -> None:
    """Let a Hugging Face checkpoint answer a question (greedily, on the CPU): the quickest sign of life."""
    from surgery.running.chat import answer

    say(answer(path, question, max_new_tokens))

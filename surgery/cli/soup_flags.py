"""The flags of `surgery soup`.

    @main.command("soup")
    @with_flags(SOUP)
    def soup_command(config, dst, **flags): ...

Only click is imported, as for everything that `surgery --help` shows.
"""

from __future__ import annotations

import click

from surgery.cli.flags import FORCE, JSON, MAX_MEMORY, NO_SYNC, NO_VERIFY, OPTIONS, PARALLEL, SHARD_SIZE, TO, Flag

SOUP: tuple[Flag, ...] = (
    click.argument("config", type=click.Path()),
    click.argument("dst", type=click.Path()),
    TO,
    *PARALLEL,
    MAX_MEMORY,
    click.option("--threads", type=click.IntRange(1), metavar="N", help="Threads that compute. [default: all cores]"),
    click.option(
        "--arithmetic",
        type=click.Choice(["fp32", "mergekit"]),
        default="fp32",
        show_default=True,
        help="fp32: round once, at the end. mergekit: work in the YAML's dtype, or the models', as mergekit does.",
    ),
    click.option("--greedy", is_flag=True, help="Keep only models that lower the loss on --eval, best first."),
    click.option("--search", type=click.IntRange(1), metavar="N", help="Try N weightings and take that with the "
                 "lowest loss on --eval."),
    click.option("--eval", "text", type=click.Path(), metavar="TEXT", help="A held-out text for --greedy or --search."),
    click.option("--eval-tokens", type=click.IntRange(8), default=8192, show_default=True, help="How much of it."),
    click.option("--device", metavar="NAME", help="Where --eval runs: cpu, cuda, ... [default: a GPU if there is one]"),
    click.option("--log", type=click.Path(), metavar="FILE", help="What was tried, one line each; tried weightings "
                 "are not tried again. [default: DST.tried.jsonl]"),
    SHARD_SIZE,
    click.option("--dry-run", is_flag=True, help="Show the plan: config, files, bytes, memory; write nothing."),
    FORCE,
    NO_VERIFY,
    NO_SYNC,
    OPTIONS,
    JSON,
)  # fmt: skip

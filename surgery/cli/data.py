"""`surgery data`: from text to token files, and what they are.

surgery data tokenize docs/*.jsonl.gz tokens --tokenizer allenai/OLMo-2-1124-7B

Commands that have files of their own are imported when they are used.
"""

from __future__ import annotations

import json
from typing import Any

import click

from surgery.cli.command import Command
from surgery.cli.flags import FORCE, JSON, SYNC, with_flags
from surgery.cli.group import Commands
from surgery.cli.terminal import say
from surgery.cli.tokenize_flags import SECTIONS, TOKENIZE
from surgery.writing.progress import counting_bar, progress_bar

ELSEWHERE = {"plan": "surgery.cli.data_plan", "show": "surgery.cli.data_plan"}  # command -> the module that has it


@click.group("data", commands=Commands(ELSEWHERE))
def data_command() -> None:
    """Turn text into token files, say what they are, mix them by token budget, and show any batch of a run.

    \b
    surgery data tokenize docs tokens --tokenizer SmolLM2-135M      text -> tokens.bin, tokens.idx
    surgery data inspect tokens --tokenizer SmolLM2-135M            what is in there?
    surgery data index dolma/part-*.npy                             an .idx for what other programs wrote
    surgery data plan mix.yaml plan --seed 42                       a mixture by token budget, and the order of a run
    surgery data show plan --step 500 --decode                      what a batch holds, of any trainer's run
    """


@data_command.command("tokenize", cls=Command, sections=SECTIONS)
@click.argument("src", nargs=-1, required=True)
@click.argument("dst", type=click.Path())
@with_flags(TOKENIZE, (FORCE, SYNC, JSON))
def tokenize_command(src: tuple[str, ...], dst: str, as_json: bool, **flags: Any) -> None:
    """Encode text into token files: the folder DST, which appears when all of it is complete.

    \b
    surgery data tokenize docs/ tokens/web --tokenizer SmolLM2-135M
    surgery data tokenize 'docs/**/*.jsonl.zst' more.parquet tokens/all --tokenizer tokenizer.json --eos 0
    surgery data tokenize s3://bucket/math tokens/math --tokenizer SmolLM2-135M --max-size 2B
    surgery data tokenize docs olmo --format dolma --tokenizer allenai/OLMo-2-1124-7B
    surgery data tokenize chats.jsonl tokens/chat --tokenizer SmolLM2-135M-Instruct --messages-key messages

    SRC: files, folders, patterns or URLs of JSON lines, Parquet or plain text, packed by gzip or zstd or not. DST holds
    Megatron's tokens.bin and tokens.idx (or dolma's part-*.npy and .csv.gz), tokens.json, which says where they come
    from, bad_lines.jsonl if there were any, and for conversations a .mask with a byte for each token: 1 where it is to
    be learnt.

    The documents keep the order of the input, however many processes work. A run that was killed goes on when it is
    repeated, and ends in the same bytes.
    """
    from pathlib import Path

    from surgery.data.tokenizing.bad_lines import Limit
    from surgery.data.tokenizing.prepare import check_sources, settings_for
    from surgery.data.tokenizing.sources import find_sources
    from surgery.data.tokenizing.tokenize import tokenize
    from surgery.data.tokenizing.vocabulary import load_vocabulary
    from surgery.writing.staging import check_free

    limit, choices = Limit.parse(flags["max_bad"]), _choices(flags)
    check_free(Path(dst), bool(flags["force"]))
    vocabulary = load_vocabulary(flags["tokenizer"])
    settings = settings_for(choices, vocabulary)
    sources, notes = find_sources(src)
    check_sources(sources, settings)
    size = sum(source.size for source in sources)
    with counting_bar("tokenize", size, ("documents", "tokens"), as_json) as advance:
        report = tokenize(
            sources,
            Path(dst),
            vocabulary,
            settings,
            workers=flags["workers"],
            max_bad=limit,
            force=bool(flags["force"]),
            durable=flags["sync"] is not False,
            progress=advance,
        )
    if as_json:
        data = report.to_json()
        click.echo(json.dumps({**data, "notes": [*vocabulary.notes, *notes, *data["notes"]]}, indent=2))
    else:
        from surgery.cli import show_tokens

        show_tokens.tokenized(report, settings, vocabulary, [*vocabulary.notes, *notes])


def _choices(flags: dict[str, Any]) -> Any:
    """The flags that decide the tokens.  Raises UsageError."""
    from surgery.data.tokenizing.prepare import Choices
    from surgery.units import parse_count

    names = Choices.__dataclass_fields__.keys() & flags.keys()
    size = flags["max_size"]
    return Choices(**{n: flags[n] for n in names} | {"max_size": None if size is None else parse_count(size)})


@data_command.command("inspect", cls=Command)
@click.argument("paths", nargs=-1, required=True, type=click.Path())
@click.option("--tokenizer", metavar="PATH", help="Check the ids against its vocabulary, and show how the text begins.")
@click.option("--vocab-size", type=click.IntRange(1), help="Check the ids against so many.")
@click.option(
    "--format",
    type=click.Choice(["auto", "megatron", "dolma", "datatrove", "npy", "datasets"]),
    default="auto",
    show_default=True,
    help="Of files whose names do not tell it.",
)
@click.option("--dtype", metavar="NAME", help="Of ids without a header, where nothing beside the file tells it.")
@click.option("--eos", type=click.IntRange(0), metavar="ID", help="The id that ends documents, where no index does.")
@JSON
def inspect_command(paths: tuple[str, ...], as_json: bool, **flags: Any) -> None:
    """Say what token files are: format, dtype, documents, tokens, the largest id, how the text begins.

    \b
    surgery data inspect tokens/web --tokenizer SmolLM2-135M
    surgery data inspect part-0-00000.npy --dtype uint32 --vocab-size 100278

    Reads Megatron's .bin/.idx, dolma's .npy, datatrove's .ds, NumPy's .npy and folders of Hugging Face datasets. Every
    id is looked at: one beyond the vocabulary, or a file that contradicts its index, is an error.
    """
    import os

    from surgery.data.inspection import inspect_tokens, token_files
    from surgery.data.tokenizing.vocabulary import load_vocabulary

    vocabulary = load_vocabulary(flags["tokenizer"]) if flags["tokenizer"] else None
    options = {name: flags[name] for name in ("format", "dtype", "eos", "vocab_size")}
    size = sum(os.path.getsize(file) for path in paths for file in token_files(path) if os.path.isfile(file))
    with progress_bar("inspect", size, as_json) as advance:
        found = [
            one for path in paths for one in inspect_tokens(path, vocabulary=vocabulary, progress=advance, **options)
        ]
    if as_json:
        click.echo(json.dumps([one.to_json() for one in found], indent=2))
    else:
        from surgery.cli import show_tokens

        show_tokens.inspected(found)


@data_command.command("index", cls=Command)
@click.argument("paths", nargs=-1, required=True, type=click.Path())
@click.option("--to", type=click.Path(), metavar="DIR", help="Put index and link there. [default: beside the payload]")
@click.option("--dtype", metavar="NAME", help="Of the ids, where nothing beside the file tells it.")
@click.option("--eos", type=click.IntRange(0), metavar="ID", help="The id that ends documents, likewise.")
@click.option("--link", type=click.Choice(["auto", "hard", "symbolic"]), default="auto", show_default=True,
              help="How the payload gets the name NAME.bin; auto: a hard link where the disk allows it.")  # fmt: skip
@JSON
def index_command(paths: tuple[str, ...], as_json: bool, **flags: Any) -> None:
    """Write a Megatron .idx for dolma's .npy, datatrove's .ds or a bare .bin; no token is copied.

    \b
    surgery data index dolma/part-*.npy
    surgery data index old/*.bin --dtype uint16 --eos 0
    surgery data index datatrove --to megatron --link symbolic

    Megatron, NeoX and surgery then read the same bytes. Where documents end is taken from what lies beside the file
    (.csv.gz, .ds.index), or from an id if you say which.
    """
    from surgery.data.payload_index import index_payload, payloads

    files = [file for path in paths for file in payloads(path)]
    done = [index_payload(file, **flags) for file in files]
    if as_json:
        click.echo(json.dumps([_plain(one) for one in done], indent=2))
        return
    for one in done:
        how = {"": "already has its name", "hard": "hard link", "symbolic": "symbolic link"}[one.linked]
        say(f"{one.index}: {one.documents:,} documents, {one.tokens:,} tokens, {one.dtype}")
        say(f"  {one.bin}: {how}" + (f" to {one.payload}" if one.linked else ""))


def _plain(done: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return {name: value if isinstance(value, int) else str(value) for name, value in asdict(done).items()}

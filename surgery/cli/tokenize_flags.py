"""The flags of `surgery data tokenize`.

    @data_command.command("tokenize")
    @with_flags(TOKENIZE)
    def tokenize_command(src, dst, **flags): ...

Only click is imported, as for everything that `surgery --help` shows.
"""

from __future__ import annotations

import click

from surgery.cli.plain_flags import Flag

SECTIONS = {
    "Text": "text-key messages-key prompt-key completion-key chat-template id-key txt max-bad",
    "Tokens": "tokenizer append-eos append-bos eos bos pad",
    "Files": "format dtype max-size force",
    "Shuffling": "seed in-order ring-size batch-size",
}
TOKENIZE: tuple[Flag, ...] = (
    click.option("--tokenizer", required=True, metavar="PATH", help="A folder or file with a tokenizer.json, a "
                 "SentencePiece model or tiktoken ranks; or a name on the hub, from its cache."),
    click.option("--format", type=click.Choice(["megatron", "dolma"]), default="megatron", show_default=True,
                 help="megatron: .bin and .idx. dolma: bare .npy and .csv.gz, as `dolma tokens` writes them: texts are "
                 "stripped, blank ones dropped, documents shuffled."),
    click.option("--text-key", "text", metavar="KEY", help="The field that holds the text. [default: text]"),
    click.option("--messages-key", "messages", metavar="KEY", help="The field that holds a conversation, in place of a "
                 "text; only what the assistant says is to be learnt."),
    click.option("--prompt-key", "prompt", metavar="KEY", help="The field of a prompt, with --completion-key; only the "
                 "completion is to be learnt."),
    click.option("--completion-key", "completion", metavar="KEY", help="See --prompt-key."),
    click.option("--chat-template", "template", type=click.Path(), metavar="FILE", help="A template in place of the "
                 "tokenizer's; {% generation %} marks in it say what is to be learnt."),
    click.option("--id-key", "id", default="id", show_default=True, help="The field of a document's name (dolma)."),
    click.option("--txt", type=click.Choice(["file", "line"]), default="file", show_default=True,
                 help="What is one document of a .txt file."),
    click.option("--append-eos/--no-append-eos", default=None, help="The end-of-text token after each document. "
                 "[default: after texts; conversations end as their template has it]"),
    click.option("--append-bos", is_flag=True, help="The beginning-of-text token before each document."),
    click.option("--eos", metavar="TOKEN", help="An id or a token's text. [default: the tokenizer's]"),
    click.option("--bos", metavar="TOKEN", help="Likewise."),
    click.option("--pad", metavar="TOKEN", help="Likewise; noted in tokens.json, never written among the tokens."),
    click.option("--dtype", metavar="NAME", help="Of the ids. [default: the smallest that the format has for the "
                 "vocabulary]"),
    click.option("--max-size", metavar="TOKENS", help="A file holds fewer tokens than this, such as 500M. [default: "
                 "one file; dolma: 1073741824]"),
    click.option("--seed", type=click.IntRange(0), help="Shuffle as `dolma tokens` does. [default: dolma 3920, "
                 "megatron the order of the input]"),
    click.option("--in-order", is_flag=True, help="Do not shuffle (dolma)."),
    click.option("--ring-size", "ring", type=click.IntRange(1), default=8, show_default=True,
                 help="Files that are read side by side."),
    click.option("--batch-size", "batch", type=click.IntRange(1), default=10_000, show_default=True,
                 help="Documents that are mixed at a time."),
    click.option("--max-bad", default="0.1%", show_default=True, metavar="LIMIT", help="Stop beyond this share or "
                 "number of bad lines: blank, no JSON, no text, broken UTF-8, all lines of a file that does not "
                 "unpack."),
    click.option("--workers", type=click.IntRange(1), metavar="N", help="Processes. [default: one for each core]"),
)  # fmt: skip

"""`surgery upcycle`: flags and recipes become `Settings`; everything else is `run`.

surgery upcycle SmolLM2-135M moe --experts 64 --top-k 8
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from surgery.progress import progress_bars

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

_SETTINGS: tuple[Decorator, ...] = (
    click.option("--experts", type=click.IntRange(1), help="How many experts each layer gets."),
    click.option("--top-k", type=click.IntRange(1), help="How many of them a token uses."),
    click.option("--strategy", metavar="NAME", help="copy: whole copies of the mlp. virtual-group: copies cut into "
                 "shards that are chosen together. partition: one mlp cut up (lossy). drop: copies, partly drawn anew "
                 "(lossy). mix: experts from several models (lossy). [default: virtual-group if top-k divides the "
                 "mlp's width and the experts, else copy]"),
    click.option("--granularity", type=click.IntRange(1), metavar="G", help="Shards per copy of the mlp "
                 "(virtual-group); divides experts, top-k and the mlp's width. [default: top-k]"),
    click.option("--target", metavar="FAMILY", help="The family of the result: mixtral, granitemoeshared, granitemoe, "
                 "qwen2_moe, qwen3_moe, flex_olmo, olmoe, glm4_moe, ernie4_5_moe. "
                 "[default: the first that holds the model exactly]"),
    click.option("--router", metavar="START", help="What the router starts from: normal[:STD], kaiming, zeros (all "
                 "experts tie), kmeans[:STD] (centres of what the router sees on a text), prompts:YAML (examples per "
                 "expert, as in mergekit), domains:YAML (a text per expert). Experts of a virtual group share their "
                 "rows. [default: normal:0.02]"),
    click.option("--scale", metavar="WHERE", help="Where the factor G goes that makes up for the shards: down, "
                 "up-down, router (a factor of the config), cbrt (on gate, up and down: published, not preserving), "
                 "none, or a NUMBER on down. [default: down]"),
    click.option("--shared", metavar="NEURONS", help="Neurons of an expert that is always on: a share (0.5), a number, "
                 "or dense for the whole mlp beside experts that add nothing at first. [default: 0]"),
    click.option("--order", metavar="ORDER", help="Which neurons go together: sequential, random, clustering (of the "
                 "rows of gate; clustering-up: of up), co-activation or gradient (these two run the model on a text). "
                 "[default: sequential]"),
    click.option("--sharing", is_flag=True, default=None, help="order gradient: experts may share neurons."),
    click.option("--text", type=click.Path(), metavar="TEXT", help="The text that the model is run on, where "
                 "the order or the router needs that. [default: some prose]"),
    click.option("--text-tokens", type=click.IntRange(1), metavar="N", help="How much of it. [default: 1024]"),
    click.option("--dense-layers", metavar="L,L", help="Layers that keep their mlp, e.g. 0,-1."),
    click.option("--normalise/--no-normalise", default=None, help="Divide the chosen experts' weights by their sum "
                 "[default], or take softmax, then top-k (exact only with --router zeros)."),
    click.option("--reinit", type=float, metavar="SHARE", help="drop: share of every expert that is drawn anew. "
                 "[default: 0.5]"),
    click.option("--reinit-indices", metavar="WHICH", help="drop: shared (the same neurons in gate, up and down) or "
                 "independent (as the published script does). [default: shared]"),
    click.option("--noise", type=float, metavar="STD", help="Noise on the experts, in standard deviations of the "
                 "weights themselves (lossy). [default: 0]"),
    click.option("--source", "sources", multiple=True, type=click.Path(),
                 help="mix: a further dense model of the same shape. Repeatable."),
    click.option("--attention", metavar="HOW", help="mix: average all that is no expert, or take the first model's. "
                 "[default: average]"),
    click.option("--collapse", metavar="MODE", is_flag=False, flag_value="exact", help="The reverse: a mixture of "
                 "experts back into a dense model. exact (of copies and virtual groups), average, or by-router "
                 "(weighted by use on a text)."),
    click.option("--attention-experts", type=click.IntRange(1), metavar="N", help="Make the attention a mixture too: N "
                 "groups of heads, written as a Hugging Face model with code of its own. With or without --experts."),
    click.option("--attention-top-k", type=click.IntRange(1), metavar="K", help="How many of the groups a token uses. "
                 "[default: all, which is exact]"),
    click.option("--seed", type=int, help="Of everything random; the same bits at any --max-memory. [default: 0]"),
    click.option("--force-lossy", is_flag=True, default=None, help="Allow what does not preserve the function."),
)  # fmt: skip

_RECIPE = click.option("--recipe", type=click.Path(), help="A YAML file with any of these settings; flags win over it.")
_DTYPE = click.option("--dtype", type=click.Choice(["keep", "bf16", "fp16", "fp32"]), default="keep", show_default=True,
                      help="Cast the weights before anything else.")  # fmt: skip
_OUTPUT: tuple[Decorator, ...] = (
    _RECIPE,
    click.option("--to", default="hf", show_default=True, metavar="FORMAT", help="The format to write."),
    click.option("--tp", type=click.IntRange(1), default=1, help="Tensor-parallel ranks of the output."),
    click.option("--pp", type=click.IntRange(1), default=1, help="Pipeline stages of the output."),
    click.option("--vpp", type=click.IntRange(1), default=1, help="Virtual pipeline chunks per stage of the output."),
    click.option("--ep", type=click.IntRange(1), default=1, help="Expert-parallel ranks of the output."),
    _DTYPE,
    click.option("--max-memory", metavar="SIZE", help="Memory for weights while writing, e.g. 512MiB."),
    click.option("--shard-size", metavar="SIZE", help="Largest weight file of Hugging Face output. [default: 5GB]"),
    click.option("--verify-tokens", type=click.IntRange(0), default=256, show_default=True,
                 help="Tokens of the proof; 0: no proof, but the output is read back."),
    click.option("--no-verify", is_flag=True, help="Neither read the output back nor prove anything."),
    click.option("--device", default="cpu", show_default=True, metavar="DEVICE", help="Where the proof runs, and the "
                 "model on a text: cpu, cuda or cuda:N."),
    click.option("--dry-run", is_flag=True, help="Show what would become of the model, and whether exactly."),
    click.option("--force", is_flag=True, help="Replace an existing output (once the new one is complete)."),
    click.option("-O", "options", multiple=True, metavar="NAME=VALUE", help="A choice of the source's or the output's "
                 "format; see `surgery formats`. Repeatable."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text."),
)  # fmt: skip


def _flags(*groups: tuple[Decorator, ...]) -> Decorator:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed([option for group in groups for option in group]):
            function = option(function)
        return function

    return decorate


@click.command("upcycle")
@click.argument("src", type=click.Path())
@click.argument("dst", type=click.Path())
@_flags(_SETTINGS, _OUTPUT)
def upcycle_command(src: str, dst: str, **flags: Any) -> None:
    """Turn a dense checkpoint into a mixture of experts, and prove whether it still computes the same.

    \b
    surgery upcycle SmolLM2-135M moe --experts 8 --top-k 2 --strategy copy
    surgery upcycle SmolLM2-135M moe --experts 64 --top-k 8          virtual groups: 64 small experts, exact
    surgery upcycle SmolLM2-135M moe --experts 8 --top-k 2 --shared 0.5
    surgery upcycle Llama-3-8B moe --experts 8 --top-k 2 --to megatron-dist --ep 8
    surgery upcycle SmolLM2-135M moe --recipe upcycle.yaml
    surgery upcycle SmolLM2-135M moe --experts 8 --top-k 2 --attention-experts 3

    Any format goes in and out, streamed in bounded memory. After writing, the source and the result run on the same
    tokens, layer by layer; the proof is printed and written to surgery.json. What would change the function is refused
    without --force-lossy, and an exact strategy that does not come out exact is an error.
    """
    from surgery.errors import UsageError
    from surgery.upcycling import api, run

    def prepared(on: Any) -> Any:
        if flags["attention_experts"]:
            return _attention(src, flags, on)
        if flags["attention_top_k"]:
            raise UsageError("--attention-top-k goes with --attention-experts")
        if flags["collapse"]:
            return api.prepare_collapse(src, flags["collapse"], bool(flags["force_lossy"]), on=on, **_shape(flags))
        return run.prepare(src, _settings(flags), dtype=flags["dtype"], on=on, **_shape(flags))

    _finish(prepared, dst, flags)


_WHICH = "[LAYERS:]E,E"
_CHOICE: tuple[Decorator, ...] = (
    click.option("--keep", multiple=True, metavar=_WHICH, help="Only these experts, in this order: 0,3-5; with layers "
                 "in front (3-5:0,1) in these layers. Repeatable."),
    click.option("--prune", multiple=True, metavar=_WHICH, help="All but these. Repeatable."),
    click.option("--best", multiple=True, metavar="[LAYERS:]N", help="The N experts of largest norm (--by). "
                 "Repeatable."),
    click.option("--by", type=click.Choice(["router-norm", "weight-norm"]), help="What --best goes by: rows of the "
                 "router, or the experts' own weights. [default: router-norm]"),
    click.option("--duplicate", type=click.IntRange(1), metavar="TIMES", help="Every expert so many times in the end, "
                 "and as many times more of them chosen: exact, a larger model to train on."),
    click.option("--merge", multiple=True, metavar="[LAYERS:]E+E,E", help="Means of experts: 0+1,2+3 makes two of "
                 "four. Repeatable."),
    click.option("--permute", multiple=True, metavar=_WHICH, help="All experts in another order: exact. Repeatable."),
    click.option("--top-k", type=click.IntRange(1), help="How many experts a token uses."),
    click.option("--noise", type=float, metavar="STD", help="duplicate: noise on all copies but the first, in standard "
                 "deviations of their own weights (lossy). [default: 0]"),
    click.option("--seed", type=int, help="Of the noise. [default: 0]"),
    click.option("--force-lossy", is_flag=True, default=None, help="Allow what does not preserve the function."),
)  # fmt: skip


@click.command("experts")
@click.argument("src", type=click.Path())
@click.argument("dst", type=click.Path())
@_flags(_CHOICE, tuple(option for option in _OUTPUT if option is not _DTYPE))
def experts_command(src: str, dst: str, **flags: Any) -> None:
    """Prune, keep, duplicate, merge or permute the experts of a mixture, or change how many are chosen.

    \b
    surgery experts Mixtral-8x7B small --keep 0,2,5,7 --force-lossy
    surgery experts Mixtral-8x7B small --keep 0-3 --keep 5:4-7 --force-lossy      other experts in layer 5
    surgery experts Mixtral-8x7B small --best 4 --force-lossy                     those that the router weighs most
    surgery experts moe twice --duplicate 2          exact: copies share the weight of what they are copies of
    surgery experts moe twice --duplicate 2 --noise 0.01 --force-lossy
    surgery experts moe fewer --top-k 1 --force-lossy
    surgery experts moe other --recipe experts.yaml  the same fields, and `layers: {3-5: {keep: [0, 1]}}`

    Experts of a virtual group belong together: what would tear them apart is refused. The proof says how far the result
    is from the source; what changes the function needs --force-lossy.
    """
    from surgery.upcycling import api
    from surgery.upcycling.selection import selection

    wanted = selection(flags, flags["recipe"])
    _finish(lambda on: api.prepare_experts(src, wanted, on=on, **_shape(flags)), dst, flags)


def _attention(src: str, flags: dict[str, Any], on: Any) -> Any:
    from surgery.errors import UsageError
    from surgery.upcycling import attention_run
    from surgery.upcycling.attention import Attention

    if flags["to"] != "hf" or flags["collapse"]:
        raise UsageError("--attention-experts goes with --to hf, and not with --collapse")
    wanted = Attention(flags["attention_experts"], flags["attention_top_k"] or flags["attention_experts"],
                       seed=flags["seed"] or 0)  # fmt: skip
    settings = _settings(flags) if flags["experts"] or flags["recipe"] else None
    return attention_run.prepare(
        src, wanted, settings, dtype=flags["dtype"], options=_options(flags), max_memory=_size(flags["max_memory"]),
        force_lossy=bool(flags["force_lossy"]), on=on,
    )  # fmt: skip


def _finish(prepared: Callable[[Any], Any], dst: str, flags: dict[str, Any]) -> None:
    """Show the plan, or carry it out and show the outcome; `prepared` is told where models run."""
    from surgery.staging import check_free
    from surgery.upcycling import render, run
    from surgery.upcycling.device import device

    dry, verify, tokens = flags["dry_run"], not flags["no_verify"], flags["verify_tokens"]
    if not dry:
        check_free(Path(dst), flags["force"])
    with progress_bars(flags["as_json"]) as begin:
        ready = prepared(device(flags["device"], begin("measure", None)))
        done = None if dry else run.carry_out(
            ready, dst, verify_tokens=tokens, force=flags["force"], verify=verify,
            command=["surgery", *sys.argv[1:]], progress=begin("write", ready.bytes_to_write(verify)),
            proving=begin("prove", ready.bytes_to_prove(tokens if verify else 0)),
        )  # fmt: skip
    if done is None:
        data = render.plan_data(ready)
        click.echo(json.dumps(data, indent=2)) if flags["as_json"] else render.plan(data)
    elif flags["as_json"]:
        click.echo(json.dumps(done.to_json(), indent=2))
    else:
        render.outcome(done)


def _settings(flags: dict[str, Any]) -> Any:
    from surgery.containers.text import read_yaml
    from surgery.upcycling.settings import Settings, from_recipe, settled

    path, values = flags["recipe"], {}
    if path:
        values = from_recipe(read_yaml(path, "recipe"), path)
    given = {name: flags[name] for name in Settings.__dataclass_fields__ if flags.get(name) not in (None, ())}
    if "dense_layers" in given:
        given["dense_layers"] = _layers(given["dense_layers"])
    return settled(values | given, None if given else path)


def _layers(text: str) -> tuple[int, ...]:
    from surgery.errors import UsageError

    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise UsageError(f"--dense-layers {text!r}: write numbers of layers, as 0,-1") from None


def _shape(flags: dict[str, Any]) -> dict[str, Any]:
    """What the output is written as."""
    return {"to": flags["to"], "topology": _topology(flags), "options": _options(flags),
            "max_memory": _size(flags["max_memory"])}  # fmt: skip


def _topology(flags: dict[str, Any]) -> Any:
    from surgery.dialect import Topology

    return Topology(tp=flags["tp"], pp=flags["pp"], vpp=flags["vpp"], ep=flags["ep"])


def _options(flags: dict[str, Any]) -> dict[str, str]:
    from surgery.errors import UsageError

    out: dict[str, str] = {}
    for pair in flags["options"]:
        name, equals, value = pair.partition("=")
        if not equals or not name or name in out:
            raise UsageError(f"-O {pair}: write -O NAME=VALUE, every name once")
        out[name] = value
    if flags["shard_size"]:
        if flags["to"] != "hf":
            raise UsageError(f"--shard-size does not apply to {flags['to']}", hint="its files are given by the ranks")
        out["shard_size"] = flags["shard_size"]
    return out


def _size(text: str | None) -> int | None:
    from surgery.sizes import parse_size

    return None if text is None else parse_size(text)

"""`surgery upcycle` and `surgery experts`: flags and recipes become settings; everything else is `run`.

surgery upcycle SmolLM2-135M moe --experts 64 --top-k 8
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from surgery.cli.flags import DTYPE, options_of, size, topology, with_flags
from surgery.cli.upcycle_flags import CHOICE, OUTPUT, SETTINGS
from surgery.writing.progress import progress_bars


@click.command("upcycle")
@click.argument("src", type=click.Path())
@click.argument("dst", type=click.Path())
@with_flags(SETTINGS, OUTPUT)
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
            _refuse_settings(flags, "--collapse")
            return api.prepare_collapse(src, flags["collapse"], bool(flags["force_lossy"]), on=on, **_shape(flags))
        return run.prepare(src, _settings(flags), dtype=flags["dtype"], on=on, **_shape(flags))

    _finish(prepared, dst, flags)


@click.command("experts")
@click.argument("src", type=click.Path())
@click.argument("dst", type=click.Path())
@with_flags(CHOICE, tuple(option for option in OUTPUT if option is not DTYPE))
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
    from surgery.upcycling.edit_experts.selection import selection

    wanted = selection(flags, flags["recipe"])
    _finish(lambda on: api.prepare_experts(src, wanted, on=on, **_shape(flags)), dst, flags)


def _attention(src: str, flags: dict[str, Any], on: Any) -> Any:
    from surgery.errors import UsageError
    from surgery.upcycling.attention import plan as attention_run
    from surgery.upcycling.attention.experts import Attention

    if flags["to"] != "hf" or flags["collapse"] or any(flags[n] != 1 for n in ("tp", "pp", "vpp", "ep")):
        raise UsageError("--attention-experts goes with --to hf on one rank, and not with --collapse")
    wanted = Attention(flags["attention_experts"], flags["attention_top_k"] or flags["attention_experts"],
                       seed=flags["seed"] or 0)  # fmt: skip
    if flags["attention"]:
        raise UsageError("--attention belongs to --strategy mix, which does not go with --attention-experts")
    settings = _settings(flags) if flags["recipe"] or _given(flags, but=("seed",)) else None
    return attention_run.prepare(
        src, wanted, settings, dtype=flags["dtype"], options=options_of(flags), max_memory=size(flags["max_memory"]),
        force_lossy=bool(flags["force_lossy"]), on=on,
    )  # fmt: skip


def _finish(prepared: Callable[[Any], Any], dst: str, flags: dict[str, Any]) -> None:
    """Show the plan, or carry it out and show the outcome; `prepared` is told where models run."""
    from surgery.cli import show_upcycling as render
    from surgery.running.device import device
    from surgery.upcycling import run
    from surgery.writing.staging import check_free

    dry, verify, tokens = flags["dry_run"], not flags["no_verify"], flags["verify_tokens"]
    if not dry:
        check_free(Path(dst), flags["force"])
    with progress_bars(flags["as_json"]) as begin:
        ready = prepared(device(flags["device"], begin("measure", None)))
        done = None if dry else run.carry_out(
            ready, dst, verify_tokens=tokens, force=flags["force"], verify=verify, sync=not flags["no_sync"],
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


def _given(flags: dict[str, Any], but: tuple[str, ...] = ()) -> list[str]:
    """The flags of an upcycling that were given."""
    from surgery.upcycling.dense_to_moe.settings import Settings, flag

    names = (n for n in Settings.__dataclass_fields__ if n != "force_lossy" and n not in but)
    return [flag(name) for name in names if flags.get(name) not in (None, ())]


def _refuse_settings(flags: dict[str, Any], where: str) -> None:
    from surgery.errors import UsageError, some

    odd = _given(flags) + (["--recipe"] if flags["recipe"] else [])
    if odd:
        raise UsageError(f"{where} does not go with {some(odd)}")
    if flags["dtype"] != "keep":
        raise UsageError(f"{where} does not go with --dtype", hint="surgery convert casts, before or after it")


def _settings(flags: dict[str, Any]) -> Any:
    from surgery.containers.text import read_yaml
    from surgery.upcycling.dense_to_moe.settings import Settings, from_recipe, settled

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
    return {"to": flags["to"], "topology": topology(flags), "options": options_of(flags),
            "max_memory": size(flags["max_memory"])}  # fmt: skip

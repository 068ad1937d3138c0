"""The flags of `surgery upcycle` and `surgery experts`, in groups.

@with_flags(SETTINGS, OUTPUT)
def command(src, dst, **flags): ...
"""

from __future__ import annotations

import click

from surgery.cli.flags import DTYPE, FORCE, JSON, MAX_MEMORY, NO_SYNC, OPTIONS, PARALLEL, SHARD_SIZE, TO, Flag

SETTINGS: tuple[Flag, ...] = (
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

RECIPE = click.option("--recipe", type=click.Path(), help="A YAML file with any of these settings; flags win over it.")
OUTPUT: tuple[Flag, ...] = (
    RECIPE,
    TO,
    *PARALLEL,
    DTYPE,
    MAX_MEMORY,
    SHARD_SIZE,
    click.option("--verify-tokens", type=click.IntRange(0), default=256, show_default=True,
                 help="Tokens of the proof; 0: no proof, but the output is read back."),
    click.option("--no-verify", is_flag=True, help="Neither read the output back nor prove anything."),
    NO_SYNC,
    click.option("--device", default="cpu", show_default=True, metavar="DEVICE", help="Where the proof runs, and the "
                 "model on a text: cpu, cuda or cuda:N."),
    click.option("--dry-run", is_flag=True, help="Show what would become of the model, and whether exactly."),
    FORCE,
    OPTIONS,
    JSON,
)  # fmt: skip

WHICH = "[LAYERS:]E,E"
CHOICE: tuple[Flag, ...] = (
    click.option("--keep", multiple=True, metavar=WHICH, help="Only these experts, in this order: 0,3-5; with layers "
                 "in front (3-5:0,1) in these layers. Repeatable."),
    click.option("--prune", multiple=True, metavar=WHICH, help="All but these. Repeatable."),
    click.option("--best", multiple=True, metavar="[LAYERS:]N", help="The N experts of largest norm (--by). "
                 "Repeatable."),
    click.option("--by", type=click.Choice(["router-norm", "weight-norm"]), help="What --best goes by: rows of the "
                 "router, or the experts' own weights. [default: router-norm]"),
    click.option("--duplicate", type=click.IntRange(1), metavar="TIMES", help="Every expert so many times in the end, "
                 "and as many times more of them chosen: exact, a larger model to train on."),
    click.option("--merge", multiple=True, metavar="[LAYERS:]E+E,E", help="Means of experts: 0+1,2+3 makes two of "
                 "four. Repeatable."),
    click.option("--permute", multiple=True, metavar=WHICH, help="All experts in another order: exact. Repeatable."),
    click.option("--top-k", type=click.IntRange(1), help="How many experts a token uses."),
    click.option("--noise", type=float, metavar="STD", help="duplicate: noise on all copies but the first, in standard "
                 "deviations of their own weights (lossy). [default: 0]"),
    click.option("--seed", type=int, help="Of the noise. [default: 0]"),
    click.option("--force-lossy", is_flag=True, default=None, help="Allow what does not preserve the function."),
)  # fmt: skip

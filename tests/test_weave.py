"""Tables and topologies: weaving against plain torch, ranks against hand-written slices, strictness, odd grids."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from surgery.errors import LayoutError
from surgery.formats.table import Table, row
from surgery.formats.topology import Rank, Topology
from surgery.formats.weave import gather, spread
from surgery.model.spec import Spec
from surgery.tensors.lazy import Lazy
from tests.test_axes import Memory

SPEC = Spec(
    "llama",
    layers=5,
    width=12,
    vocab=14,
    kv_heads=4,
    group=3,
    head_dim=4,
    ffn=8,
    experts=6,
    expert_ffn=10,
    top_k=2,
    moe_layers=(1, 2, 4),
)

TABLE = Table(
    "woven",
    (
        row("emb", "embed", cut="v", pad="v"),
        row("layers.{l}.n1", "attn_norm"),
        row("layers.{l}.qkv", "attn.q", "attn.k", "attn.v", layout="(g * d) h", cut="g"),
        row("layers.{l}.o", "attn.o", cut="g"),
        row("layers.{l}.n2", "mlp_norm"),
        row("layers.{l}.fc1", "mlp.gate", "mlp.up", layout="(* f) h", cut="f"),
        row("layers.{l}.fc2", "mlp.down", cut="f"),
        row("layers.{l}.router", "router"),
        row("layers.{l}.experts.{e}.fc1", "experts.{e}.up", "experts.{e}.gate", layout="(* m) h", cut="m"),
        row("layers.{l}.experts.{e}.fc2", "experts.{e}.down", layout="m h", cut="m"),
        row("norm", "final_norm", stage=-1),
        row("head", "lm_head", cut="v", pad="v", stage=-1),
    ),
    vocab_multiple=4,
)


def random_parts(spec: Spec) -> dict[str, Lazy]:
    from surgery.model.spec import layout

    generator = torch.Generator().manual_seed(1)
    out = {}
    for name in spec.part_names():
        shape = [torch.tensor([spec.sizes[a] for a in g]).prod() for g in layout(name)]
        out[name] = Memory(torch.randn([int(n) for n in shape], generator=generator))
    return out


def stored(shards):
    return {rank: {name: s.tensor for name, s in tensors.items()} for rank, tensors in shards.items()}


PARTS = random_parts(SPEC)


@pytest.mark.parametrize(
    "topology",
    [
        Topology(),
        Topology(tp=2),
        Topology(tp=2, ep=2),
        Topology(pp=5),
        Topology(ep=3),
        Topology(tp=2, pp=2, ep=2, stages=(3, 2)),
        Topology(pp=2, vpp=2, stages=(1, 2, 1, 1)),
        Topology(tp=2, pp=1, ep=6, vpp=5),
    ],
)
def test_there_and_back(topology):
    shards = stored(spread(TABLE, PARTS, SPEC, topology))
    assert set(shards) == set(topology.ranks())
    spec = SPEC.replace(vocab=-(-14 // (4 * topology.tp)) * 4 * topology.tp)
    back = gather(TABLE, shards, spec, topology).parts
    assert list(back) == list(SPEC.part_names())
    for name, part in PARTS.items():
        got = back[name].full()
        assert torch.equal(got[: part.shape[0]], part.tensor), name
        assert not got[part.shape[0] :].any()  # padding rows are zeros


def test_what_a_rank_holds():
    """Against slices written by hand: rank 1 of 2, second stage of two uneven ones, second half of the experts."""
    topology = Topology(tp=2, pp=2, ep=2, stages=(3, 2))
    held = stored(spread(TABLE, PARTS, SPEC, topology))[Rank(tp=1, pp=1, ep=1)]
    q, k, v = (PARTS[f"layers.3.attn.{x}"].tensor for x in "qkv")
    groups = [torch.cat([q[12 * g : 12 * g + 12], k[4 * g : 4 * g + 4], v[4 * g : 4 * g + 4]]) for g in (2, 3)]
    assert torch.equal(held["layers.0.qkv"].full(), torch.cat(groups))
    assert torch.equal(held["layers.0.o"].full(), PARTS["layers.3.attn.o"].tensor[:, 24:])
    gate, up = PARTS["layers.3.mlp.gate"].tensor, PARTS["layers.3.mlp.up"].tensor
    assert torch.equal(held["layers.0.fc1"].full(), torch.cat([gate[4:], up[4:]]))
    expert = "layers.4.experts.5."
    assert torch.equal(
        held["layers.1.experts.2.fc1"].full(), torch.cat([PARTS[expert + x].tensor[5:] for x in ("up", "gate")])
    )
    assert torch.equal(held["layers.1.experts.2.fc2"].full(), PARTS[expert + "down"].tensor[:, 5:].T)
    assert "layers.1.experts.3.fc1" not in held
    head = torch.cat([PARTS["lm_head"].tensor, torch.zeros(2, 12)])
    assert torch.equal(held["head"].full(), head[8:])
    assert "emb" not in held


def test_interleaved_stages():
    topology = Topology(pp=2, vpp=2, stages=(1, 2, 1, 1))
    assert topology.places(5) == [(0, 0, 0), (1, 0, 0), (1, 0, 1), (0, 1, 0), (1, 1, 0)]
    shards = stored(spread(TABLE, PARTS, SPEC, topology))
    assert torch.equal(shards[Rank(pp=1, chunk=1)]["layers.0.n1"].full(), PARTS["layers.4.attn_norm"].tensor)
    assert "norm" in shards[Rank(pp=1, chunk=1)]
    assert "emb" in shards[Rank(pp=0, chunk=0)]


def test_fewer_heads_than_ranks_are_copied_and_compared():
    spec = dataclasses.replace(SPEC, kv_heads=2, group=6, experts=0, moe_layers=())
    parts = random_parts(spec)
    heads = (
        row("layers.{l}.q", "attn.q", cut="g n"),
        row("layers.{l}.k", "attn.k", cut="g"),
        row("layers.{l}.v", "attn.v", cut="g"),
        row("layers.{l}.o", "attn.o", cut="g n"),
    )
    table = Table("d", (*(r for r in TABLE.rows if r.name not in ("layers.{l}.qkv", "layers.{l}.o")), *heads))
    shards = spread(table, parts, spec, Topology(tp=4))
    assert [shards[Rank(tp=i)]["layers.0.k"].copy for i in range(4)] == [False, True, False, True]
    assert torch.equal(shards[Rank(tp=3)]["layers.0.k"].tensor.full(), parts["layers.0.attn.k"].tensor[4:])
    plain = stored(shards)
    back = gather(table, plain, spec.replace(vocab=16), Topology(tp=4)).parts
    assert torch.equal(back["layers.0.attn.k"].full(), parts["layers.0.attn.k"].tensor)
    plain[Rank(tp=1)]["layers.0.k"] = Memory(torch.zeros(4, 12))
    wrong = gather(table, plain, spec.replace(vocab=16), Topology(tp=4)).parts
    with pytest.raises(LayoutError, match=r"layers.0.k should be the same"):
        wrong["layers.0.attn.k"].full()


def test_stacks_of_layers_and_experts():
    spec = dataclasses.replace(SPEC, moe_layers=())
    parts = random_parts(spec)
    stacked = Table("stacked", (
        row("emb", "embed"), row("n1", "attn_norm", layout="l h"), row("n2", "mlp_norm", layout="l h"),
        row("qkv", "attn.q", "attn.k", "attn.v", layout="l (g * d) h"), row("o", "attn.o", layout="l h (g n d)"),
        row("router", "router", layout="(l e) h"), row("down", "experts.{e}.down", layout="(e m) l h"),
        row("up", "experts.{e}.gate", "experts.{e}.up", layout="l e (* m) h"), row("norm", "final_norm"),
        row("head", "lm_head", layout="h v"),
    ))  # fmt: skip
    held = stored(spread(stacked, parts, spec, Topology()))[Rank()]
    down = torch.stack(
        [torch.cat([parts[f"layers.{i}.experts.{e}.down"].tensor.T for e in range(6)]) for i in range(5)], 1
    )
    assert torch.equal(held["down"].full(), down)
    up = [torch.cat([parts[f"layers.3.experts.{e}.{x}"].tensor for x in ("gate", "up")]) for e in range(6)]
    assert torch.equal(held["up"][3], torch.stack(up))
    assert torch.equal(held["head"].full(), parts["lm_head"].tensor.T)
    back = gather(stacked, {Rank(): held}, spec, Topology()).parts
    assert all(torch.equal(back[n].full(), parts[n].tensor) for n in parts)


def test_sums_over_ranks():
    spec = Spec(
        "x", layers=1, width=6, vocab=4, kv_heads=2, group=1, head_dim=2, ffn=4, o_bias=True, glu=False, norm="none"
    )
    table = Table("s", (row("e", "embed"), row("{l}.q", "attn.q", cut="g"), row("{l}.k", "attn.k", cut="g"),
                          row("{l}.v", "attn.v", cut="g"), row("{l}.o", "attn.o", cut="g"), row("h", "lm_head"),
                          row("{l}.b", "attn.o.bias", summed=True), row("{l}.u", "mlp.up", cut="f"),
                          row("{l}.d", "mlp.down", cut="f")))  # fmt: skip
    parts = random_parts(spec)
    shards = stored(spread(table, parts, spec, Topology(tp=2)))
    assert torch.equal(shards[Rank(tp=1)]["0.b"].full(), parts["layers.0.attn.o.bias"].tensor / 2)
    shards[Rank(tp=1)]["0.b"] = Memory(torch.ones(6))
    back = gather(table, shards, spec, Topology(tp=2)).parts["layers.0.attn.o.bias"].full()
    assert torch.equal(back, parts["layers.0.attn.o.bias"].tensor / 2 + 1)


def test_gaps_and_surplus_are_all_named():
    shards = stored(spread(TABLE, PARTS, SPEC, Topology(tp=2)))
    del shards[Rank(tp=1)]["layers.2.o"]
    shards[Rank(tp=0)]["mystery"] = Memory(torch.zeros(1))
    shards[Rank(tp=0)]["layers.1.fc9"] = Memory(torch.zeros(1))
    with pytest.raises(LayoutError) as error:
        gather(TABLE, shards, SPEC.replace(vocab=16), Topology(tp=2))
    assert "layers.2.o is missing (on 1 of 2 ranks)" in str(error.value)
    assert "2 tensors have no place in a woven llama: layers.1.fc9, mystery" in str(error.value)


def test_a_part_without_a_row_is_an_error():
    short = Table("short", tuple(r for r in TABLE.rows if r.name != "layers.{l}.router"))
    with pytest.raises(LayoutError, match=r"short has no place for layers.N.router \(3\)"):
        spread(short, PARTS, SPEC, Topology())


def test_ignored_tensors_are_reported_with_the_reason():
    shards = stored(spread(TABLE, PARTS, SPEC, Topology()))
    shards[Rank()]["layers.0.rotary.inv_freq"] = Memory(torch.zeros(2))
    lenient = dataclasses.replace(TABLE, ignore=((r"inv_freq$", "computed"),))
    found = gather(lenient, shards, SPEC.replace(vocab=16), Topology())
    assert found.ignored == {"layers.0.rotary.inv_freq": "computed"}


@pytest.mark.parametrize(
    ("topology", "text"),
    [
        (Topology(tp=3), "cannot divide 4 key/value heads"),
        (Topology(pp=2), "cannot divide 5 layers among 2"),
        (Topology(ep=4), "cannot divide 6 experts among 4"),
        (Topology(pp=2, stages=(4, 2)), "do not make 5 layers"),
    ],
)
def test_what_cannot_be_divided_is_refused(topology, text):
    with pytest.raises(LayoutError, match=text):
        spread(TABLE, PARTS, SPEC, topology)


def test_a_wrong_shape_names_the_tensor():
    shards = stored(spread(TABLE, PARTS, SPEC, Topology()))
    shards[Rank()]["layers.3.o"] = Memory(torch.zeros(12, 40))
    with pytest.raises(LayoutError, match=r"layers.3.o has shape \[12, 40\], but 'h \(g n d\)'"):
        gather(TABLE, shards, SPEC.replace(vocab=16), Topology())

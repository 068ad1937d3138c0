"""Megatron: golden checkpoints of the real program, its shards assembled by hand, and every way to be wrong."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from surgery.containers import open_file
from surgery.containers.dcp import Dcp
from surgery.containers.dcp_writer import dcp_files
from surgery.conversion.convert import convert
from surgery.errors import SurgeryError
from surgery.formats.megatron import dist as megatron_dist
from surgery.formats.megatron import files as folders
from surgery.formats.megatron import table as megatron_table
from surgery.formats.registry import open_checkpoint
from surgery.formats.topology import Rank, Topology
from surgery.formats.weave import gather
from surgery.tensors.lazy import same_bits
from surgery.writing.stream import write
from tests import oracle, reference, tiny

GOLDEN = oracle.GOLDEN / "megatron"
LEGACY, MIXED, DIST = "a_llama_legacy_tp2pp2", "d_moemix_legacy_tp1", "c_llama_torchdist_tp1_te23"


def tensors_of(folder, key="model"):
    """{folder of a rank: its tensors}, read by surgery: containers are tested elsewhere against torch."""
    out = {}
    for path in sorted(folder.glob("*/mp_rank_*/model_optim_rng.pt")):
        out[path.parent.name] = {k: t.full() for k, t in folders.tensors_of(open_file(path).root[key], path).items()}
    return out


def stock(path):
    """A written file as torch itself reads it: nothing but tensors, primitives and a Namespace."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", [LEGACY, MIXED, DIST])
def test_golden_logits(name):
    ids, want = oracle.expected(f"megatron/{name}")
    assert oracle.gap(reference.logits(open_checkpoint(GOLDEN / name / "checkpoint"), ids), want) < 2e-5


@pytest.mark.parametrize(("name", "sizes"), [(LEGACY, {"tp": 2, "pp": 2}), (MIXED, {})])
def test_written_back_as_upstream_wrote_it(name, sizes, tmp_path):
    source = GOLDEN / name / "checkpoint"
    convert(source, tmp_path / "out", to="megatron", topology=Topology(**sizes))
    ours, theirs = tensors_of(tmp_path / "out"), tensors_of(source)
    assert ours.keys() == theirs.keys()
    for rank, tensors in theirs.items():
        assert ours[rank].keys() == tensors.keys()
        assert all(same_bits(ours[rank][k], t) for k, t in tensors.items())
        there = open_file(next(source.glob(f"*/{rank}/*.pt"))).root
        here = stock(tmp_path / f"out/iter_0000001/{rank}/model_optim_rng.pt")
        assert list(here["model"].keys() ^ there["model"].keys()) == []  # _extra_state entries too
        args = {k: v for k, v in vars(here["args"]).items() if k in there["args"].state}
        odd = {k for k, v in args.items() if there["args"].state[k] != v}
        assert odd <= {"use_rotary_position_embeddings", "tokenizer_type", "vocab_size"}
        assert here["iteration"] == 1
        assert here["checkpoint_version"] == 3.0
    assert (tmp_path / "out" / folders.TRACKER).read_text() == "1"


def test_written_dist_is_what_torch_and_upstream_read(tmp_path):
    import torch.distributed.checkpoint as dcp

    source = GOLDEN / DIST / "checkpoint"
    convert(source, tmp_path / "out", to="megatron-dist", options={"spec": "te"})
    theirs, where = Dcp(source / "iter_0000001"), tmp_path / "out/iter_0000001"
    state = {name: torch.empty(t.shape, dtype=t.torch_dtype) for name, t in theirs.tensors.items()}
    dcp.load(state, storage_reader=dcp.FileSystemReader(where), no_dist=True)
    assert all(same_bits(state[name], t.full()) for name, t in theirs.tensors.items())
    ours = Dcp(where)
    assert ours.tensors.keys() == theirs.tensors.keys()
    wanted = {name for name in theirs.objects if "_extra_state" in name}
    assert wanted
    assert wanted <= ours.objects.keys()
    assert all(ours.objects[name]() == [None] for name in wanted)
    assert json.loads((where / "metadata.json").read_text()) == json.loads(
        (source / "iter_0000001/metadata.json").read_text()
    )
    assert vars(stock(where / "common.pt")["args"])["num_layers"] == 4


def mutants(row, tp):
    """The same row with its parts, or the axes of a dimension, in another order, or as another part.

    What a single rank holds is the same however it is cut.
    """
    for i in range(1, len(row.parts)):
        parts = list(row.parts)
        parts[i - 1 : i + 1] = parts[i], parts[i - 1]
        yield dataclasses.replace(row, parts=tuple(parts))
    for i, group in enumerate(row.layout):
        if len(group) > 1:
            yield dataclasses.replace(row, layout=(*row.layout[:i], (*group[1:], group[0]), *row.layout[i + 1 :]))
    if tp > 1 and row.cut in ("f", "m", "s") and len(row.layout[0]) > 1:
        yield dataclasses.replace(row, cut="*")
    swaps = {"attn_norm": "mlp_norm", "mlp_norm": "attn_norm", "embed": "lm_head", "lm_head": "embed"}
    for old, new in swaps.items():
        if row.parts[0].endswith(old):
            yield dataclasses.replace(row, parts=(row.parts[0].removesuffix(old) + new,))


@pytest.mark.parametrize("name", [LEGACY, MIXED, DIST])
def test_a_mistake_in_any_row_shows(name):
    """Every table row mutated: the logits of the real program tell, or the shapes do."""
    opened = open_checkpoint(GOLDEN / name / "checkpoint")
    ids, want = oracle.expected(f"megatron/{name}")
    if name == DIST:
        shards = {Rank(): Dcp(GOLDEN / name / "checkpoint/iter_0000001").tensors}
        table, topology = megatron_table.dist_table("local_dist", shards[Rank()]), Topology()
    else:
        files = folders.rank_files(GOLDEN / name / "checkpoint/iter_0000001", opened.topology)
        shards = {rank: folders.open_rank(path).chunks[0] for rank, path in files.items()}
        table, topology = megatron_table.table("local", "sequential"), opened.topology
    tried = 0
    for row in table.rows:
        if row.copy or next(row.binds(opened.spec), None) is None:
            continue
        for mutant in mutants(row, topology.tp):
            tried += 1
            rows = tuple(mutant if r is row else r for r in table.rows)
            try:
                parts = gather(dataclasses.replace(table, rows=rows), shards, opened.spec, topology).parts
                wrong = reference.logits(dataclasses.replace(opened, parts=parts), ids)
            except (SurgeryError, AssertionError, KeyError, ValueError):
                continue
            assert oracle.gap(wrong, want) > 1e-3, f"{row.name} as {mutant}"
    assert tried > 9


# ------------------------------------------------------------------------------- shards assembled by hand


@pytest.fixture(scope="module")
def moe(tiny_hf, tmp_path_factory):
    """A Qwen3-MoE: its Hugging Face tensors and a function that writes it as Megatron."""
    source = tiny_hf("qwen3_moe")

    def to(**flags):
        options = flags.pop("options", {})
        out = tmp_path_factory.mktemp("megatron") / "out"
        convert(source, out, to=flags.pop("to", "megatron"), topology=Topology(**flags), options=options)
        return out

    return load_file(source / "model.safetensors"), to


def expert(tensors, layer, e):
    """fc1 and fc2 of an expert: gate over up, and down."""
    at = f"model.layers.{layer}.mlp.experts."
    if f"{at}gate_up_proj" in tensors:
        return tensors[f"{at}gate_up_proj"][e], tensors[f"{at}down_proj"][e]
    gate, up, down = (tensors[f"{at}{e}.{k}_proj.weight"] for k in ("gate", "up", "down"))
    return torch.cat([gate, up]), down


def test_shards_of_a_dense_layer(moe):
    hf, to = moe
    out = tensors_of(to(tp=2, options={"spec": "local"}))
    at, groups, n, width = "model.layers.0.", 4, 3, 10
    q, k, v = (hf[f"{at}self_attn.{x}_proj.weight"].view(groups, -1, width, 104) for x in "qkv")
    gate, up = (hf[f"{at}mlp.{x}_proj.weight"] for x in ("gate", "up"))
    for rank in range(2):
        got, mine = out[f"mp_rank_0{rank}"], range(2 * rank, 2 * rank + 2)
        rows = torch.cat([torch.cat([q[g].flatten(0, 1), k[g, 0], v[g, 0]]) for g in mine])
        assert torch.equal(got["decoder.layers.0.self_attention.linear_qkv.weight"], rows)
        half = slice(72 * rank, 72 * rank + 72)
        fc1 = torch.cat([gate[half], up[half]])
        assert torch.equal(got["decoder.layers.0.mlp.linear_fc1.weight"], fc1)
        columns = slice(rank * 2 * n * width, (rank + 1) * 2 * n * width)
        assert torch.equal(
            got["decoder.layers.0.self_attention.linear_proj.weight"], hf[f"{at}self_attn.o_proj.weight"][:, columns]
        )
        assert got["embedding.word_embeddings.weight"].shape == (256, 104)  # 264 tokens, padded to 512
    both = torch.cat([out[f"mp_rank_0{r}"]["embedding.word_embeddings.weight"] for r in range(2)])
    assert torch.equal(both[:264], hf["model.embed_tokens.weight"])
    assert not both[264:].any()


@pytest.mark.parametrize("kind", ["sequential", "grouped", "te_grouped"])
def test_shards_of_experts(moe, kind):
    """Eight experts on two ranks of two: names, ranks, and the memory behind GroupedMLP's odd shapes."""
    hf, to = moe
    out = tensors_of(to(tp=2, ep=2, options={"spec": "te", "experts": kind}))
    assert set(out) == {"mp_rank_00_000", "mp_rank_01_000", "mp_rank_00_001", "mp_rank_01_001"}
    for ep in range(2):
        for tp in range(2):
            got = out[f"mp_rank_0{tp}_00{ep}"]
            for local in range(4):
                fc1, down = expert(hf, 1, 4 * ep + local)
                part = slice(28 * tp, 28 * tp + 28)
                fc1 = torch.cat([fc1[:56][part], fc1[56:][part]])
                at = "decoder.layers.1.mlp.experts."
                if kind == "grouped":
                    one = got[f"{at}weight1"], got[f"{at}weight2"]
                    assert one[0].shape == (104, 4 * 56)
                    mine = one[0].view(4, 104, 56)[local].T, one[1].view(4, 28, 104)[local].T
                elif kind == "te_grouped":
                    mine = got[f"{at}linear_fc1.weight{local}"], got[f"{at}linear_fc2.weight{local}"]
                else:
                    mine = tuple(got[f"{at}local_experts.{local}.linear_fc{i}.weight"] for i in (1, 2))
                assert torch.equal(mine[0], fc1)
                assert torch.equal(mine[1], down[:, part])
            assert torch.equal(got["decoder.layers.1.mlp.router.weight"], hf["model.layers.1.mlp.gate.weight"])
            assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in got  # layer 0 is dense
            assert "decoder.layers.1.pre_mlp_layernorm.weight" in got


def test_incomplete_grid(moe):
    """With one expert-tensor rank, tensor and expert ranks go together: half of the folders never exist."""
    hf, to = moe
    out = tensors_of(to(tp=2, ep=2, options={"spec": "te", "etp": "1"}))
    assert set(out) == {"mp_rank_00_000", "mp_rank_01_001"}
    got = out["mp_rank_01_001"]["decoder.layers.3.mlp.experts.local_experts.1.linear_fc1.weight"]
    assert torch.equal(got, expert(hf, 3, 5)[0])


def test_virtual_pipeline(moe):
    """Chunk v of stage p holds the layers from v * L/V + p * L/(P V) on."""
    hf, to = moe
    folder = to(pp=2, vpp=3, options={"spec": "local"})
    for stage in range(2):
        root = stock(folder / f"iter_0000001/mp_rank_00_00{stage}/model_optim_rng.pt")
        for chunk in range(3):
            got = root[f"model{chunk}"]
            norm = hf[f"model.layers.{2 * chunk + stage}.input_layernorm.weight"]
            assert torch.equal(got["decoder.layers.0.input_layernorm.weight"], norm)
            assert ("output_layer.weight" in got) == ((stage, chunk) == (1, 2))
            assert ("embedding.word_embeddings.weight" in got) == ((stage, chunk) == (0, 0))
        assert root["args"].virtual_pipeline_model_parallel_size == 3


def test_uneven_stages(tiny_hf, tmp_path):
    convert(tiny_hf("llama"), tmp_path / "out", to="megatron", topology=Topology(pp=3, stages=(1, 3, 2)))
    assert open_checkpoint(tmp_path / "out").topology.stages == (1, 3, 2)
    last = tensors_of(tmp_path / "out")["mp_rank_00_002"]
    norm = load_file(tiny_hf("llama") / "model.safetensors")["model.layers.4.input_layernorm.weight"]
    assert torch.equal(last["decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"], norm)


def test_tied_copy_on_the_last_stage(tiny_hf, tmp_path):
    convert(tiny_hf("qwen2"), tmp_path / "two", to="megatron", topology=Topology(pp=2))
    convert(tiny_hf("qwen2"), tmp_path / "one", to="megatron")
    two, one = tensors_of(tmp_path / "two"), tensors_of(tmp_path / "one")
    first, last = (two[f"mp_rank_00_00{i}"] for i in range(2))
    assert torch.equal(last["output_layer.weight"], first["embedding.word_embeddings.weight"])
    assert "output_layer.weight" not in one["mp_rank_00"]
    assert "decoder.layers.0.self_attention.linear_qkv.bias" in first


@pytest.mark.parametrize("version", [0, 1.0, 2.0, 3.0])
def test_precore_models(tiny_hf, tmp_path, version):
    """Nested trees under old names; queries, keys and values in the order of the checkpoint's version."""
    hf = load_file(tiny_hf("gpt2") / "model.safetensors")
    heads, width, h = 12, 10, 120
    flat = {
        "final_layernorm.weight": hf["transformer.ln_f.weight"],
        "final_layernorm.bias": hf["transformer.ln_f.bias"],
    }
    for i in range(6):
        at, own = f"layers.{i}.", f"transformer.h.{i}."
        for old, new in (("input_layernorm", "ln_1"), ("post_attention_layernorm", "ln_2")):
            flat |= {f"{at}{old}.{k}": hf[f"{own}{new}.{k}"] for k in ("weight", "bias")}
        for old, new in (("attention.dense", "attn.c_proj"), ("mlp.dense_h_to_4h", "mlp.c_fc"),
                         ("mlp.dense_4h_to_h", "mlp.c_proj")):  # fmt: skip
            flat |= {f"{at}{old}.weight": hf[f"{own}{new}.weight"].T, f"{at}{old}.bias": hf[f"{own}{new}.bias"]}
        for k in ("weight", "bias"):
            rows = hf[f"{own}attn.c_attn.{k}"].T.reshape(3, heads, width, *([h] if k == "weight" else []))
            rows = rows if version == 0 else rows.movedim(0, 2) if version == 1 else rows.movedim(0, 1)
            flat[f"{at}attention.query_key_value.{k}"] = rows.reshape(360, *([h] if k == "weight" else []))
    embedding = {"word_embeddings": {"weight": hf["transformer.wte.weight"]},
                 "position_embeddings": {"weight": hf["transformer.wpe.weight"]}}  # fmt: skip
    args = argparse.Namespace(num_layers=6, hidden_size=h, num_attention_heads=heads, ffn_hidden_size=144,
                              max_position_embeddings=128, padded_vocab_size=264, model_parallel_size=1,
                              bias_gelu_fusion=True, layernorm_epsilon=1e-5)  # fmt: skip
    model = {"language_model": {"embedding": embedding, "transformer": {k: t.contiguous() for k, t in flat.items()}}}
    state = {"args": args, "model": model, "iteration": 5, "checkpoint_version": version}
    (tmp_path / "release/mp_rank_00").mkdir(parents=True)
    torch.save(state, tmp_path / "release/mp_rank_00/model_optim_rng.pt")
    (tmp_path / folders.TRACKER).write_text("release")
    opened, want = open_checkpoint(tmp_path), open_checkpoint(tiny_hf("gpt2"))
    assert not {k: v for k, v in opened.spec.differences(want.spec).items() if k != "true_vocab"}
    assert opened.parts.keys() == want.parts.keys()
    assert all(same_bits(opened.parts[k].full(), part.full()) for k, part in want.parts.items())
    assert any("not stated" in note for note in opened.notes)


# ------------------------------------------------------------------------------------------- spellings of torch_dist


def rewritten(folder, out, rename, objects=None, common=True):
    """A torch_dist folder with its entries renamed, split or given other neighbours."""
    where = folder / "iter_0000001"
    dcp = Dcp(where)
    tensors = {}
    for name, tensor in dcp.tensors.items():
        tensors |= rename(name, tensor)
    files = dcp_files("", tensors, objects or {})
    write(files, out, max_memory=64 << 20, job={}, ledger=None, progress=None, force=False)
    shutil.copy(where / "metadata.json", out)
    if common:
        shutil.copy(where / "common.pt", out)
    return out


def singleton(name, tensor):
    """singleton_local_shards: a key per layer and expert, gate and up apart."""
    from surgery.tensors.lazy import Slice

    for part in (".mlp.linear_fc1.weight", ".mlp.experts.experts.linear_fc1.weight", ".experts.linear_fc2.weight"):
        if name.endswith(part) and ".layers." in name:
            experts = range(tensor.shape[0]) if "experts" in part else (None,)
            out = {}
            for e in experts:
                one = tensor if e is None else Whole(Slice(tensor, 0, e, e + 1))
                at = name if e is None else name.replace("experts.experts.", f"experts.experts.{e}.")
                if "fc2" in part:
                    out[at] = one
                    continue
                half = one.shape[0] // 2
                out |= {f"{at}_w": Slice(one, 0, 0, half), f"{at}_v": Slice(one, 0, half, 2 * half)}
            return out
    return {name: tensor}


def Whole(tensor):
    """A lazy tensor without its first dimension of size one."""
    from surgery.tensors.axes import Rearrange

    sizes = {"one": 1, "a": tensor.shape[1], "b": tensor.shape[2]}
    return Rearrange(tensor, (("one",), ("a",), ("b",)), (("one", "a"), ("b",)), sizes)


def test_dist_layers_that_differ_are_numbered(moe, tmp_path):
    hf, to = moe
    folder = to(to="megatron-dist", tp=2, options={"spec": "te"})
    dcp = Dcp(folder / "iter_0000001")
    stack = dcp.tensors["decoder.layers.2.mlp.experts.experts.linear_fc1.weight"]
    assert torch.equal(stack[3], expert(hf, 2, 3)[0])
    assert "decoder.layers.1.mlp.experts.experts.linear_fc2._extra_state/shard_7_8" in dcp.objects
    again = open_checkpoint(rewritten(folder, tmp_path / "singleton", singleton))
    want = open_checkpoint(folder)
    assert all(same_bits(again.parts[k].full(), part.full()) for k, part in want.parts.items())
    assert again.details["layers are"] == "numbered"


def test_common_state_inside(tmp_path):
    """Core 0.20 has no common.pt, but an object."""
    source = GOLDEN / DIST / "checkpoint"
    from surgery.containers.torch_writer import Record

    args = {k: v for k, v in open_checkpoint(source).config.items() if type(v) in (int, float, str, bool, type(None))}
    common = {"args": Record("argparse", "Namespace", (), args), "iteration": 9}
    folder = rewritten(source, tmp_path / "new", lambda k, t: {k: t}, {megatron_dist.COMMON: [common]}, common=False)
    assert open_checkpoint(folder).details["iteration"] == 9
    (folder / ".metadata").unlink()
    with pytest.raises(SurgeryError):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda f: (f / "metadata.json").write_text('{"sharded_backend": "zarr"}'), "only torch_dist is read"),
        (lambda f: (f / "common.pt").unlink(), "neither common.pt nor common_state"),
        (lambda f: ((f / "common.pt").unlink(), (f / "run_config.yaml").write_text("a: 1")), "Megatron-Bridge"),
        (lambda f: (f / "__0_0.distcp").unlink(), "__0_0.distcp"),
    ],
)
def test_dist_refusals(tmp_path, change, text):
    shutil.copytree(GOLDEN / DIST / "checkpoint", tmp_path / "copy")
    change(tmp_path / "copy/iter_0000001")
    with pytest.raises(SurgeryError, match=text):
        {k: part.full() for k, part in open_checkpoint(tmp_path / "copy").parts.items()}


# ------------------------------------------------------------------------------------------------ folders and files


def test_where_an_iteration_is_found(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(GOLDEN / MIXED / "checkpoint", run)
    shutil.copytree(run / "iter_0000001", run / "iter_0000002")
    assert open_checkpoint(run).files[0].parts[-3] == "iter_0000001"
    assert open_checkpoint(run / "iter_0000002").format == "megatron"
    (run / folders.TRACKER).unlink()
    with pytest.raises(SurgeryError, match="several iterations"):
        open_checkpoint(run, format="megatron")
    (run / folders.TRACKER).write_text("77")
    with pytest.raises(SurgeryError, match=r"iter_0000077, but that folder is missing"):
        open_checkpoint(run)


def _namespace(path, **changes):
    """Rewrite a rank's file with other args, keeping its tensors."""
    root = dict(open_file(path).root)
    args = {k: v for k, v in root["args"].state.items() if type(v) in (int, float, str, bool, list, type(None))}
    model = {k: t.full() for k, t in folders.tensors_of(root["model"], path).items()}
    state = {"args": argparse.Namespace(**{**args, **changes.pop("args", {})}), "model": model, "iteration": 1,
             "checkpoint_version": 3.0, **changes}  # fmt: skip
    torch.save(state, path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda f: shutil.rmtree(f / "mp_rank_01_001"), r"mp_rank_01_001 missing; its args say tp 2, pp 2"),
        (lambda f: shutil.copytree(f / "mp_rank_01_001", f / "mp_rank_02_000"), "mp_rank_02_000 should not be there"),
        (lambda f: (f / "mp_rank_01_001/model_optim_rng.pt").unlink(), "holds no model_optim_rng.pt"),
        (lambda f: _namespace(f / "mp_rank_01_000/model_optim_rng.pt", iteration=2), "different saves"),
        (lambda f: _namespace(f / "mp_rank_00_000/model_optim_rng.pt", args={"num_layers": 5}), "num_layers 5"),
        (lambda f: _namespace(f / "mp_rank_00_000/model_optim_rng.pt", args={"num_query_groups": 1}), "1 key/value"),
        (lambda f: _namespace(f / "mp_rank_00_000/model_optim_rng.pt", args={"tensor_model_parallel_size": "2"}),
         "tensor_model_parallel_size is '2'"),
        (lambda f: _namespace(f / "mp_rank_00_000/model_optim_rng.pt", checkpoint_version="3"), "checkpoint_version"),
        (lambda f: _namespace(f / "mp_rank_00_000/model_optim_rng.pt", model={"w": argparse.Namespace()}),
         "no plain tensor"),
        (lambda f: _namespace(f / "mp_rank_00_000/model_optim_rng.pt", model={"w": torch.ones(2)}), "no matrix emb"),
    ],
)  # fmt: skip
def test_broken_ranks(tmp_path, change, text):
    shutil.copytree(GOLDEN / LEGACY / "checkpoint", tmp_path / "copy")
    change(tmp_path / "copy/iter_0000001")
    with pytest.raises(SurgeryError, match=text):
        open_checkpoint(tmp_path / "copy")


def test_unequal_copies_are_found(tmp_path):
    """Norms are the same on both tensor-parallel ranks; if they are not, reading says so."""
    shutil.copytree(GOLDEN / LEGACY / "checkpoint", tmp_path / "copy")
    path = tmp_path / "copy/iter_0000001/mp_rank_01_000/model_optim_rng.pt"
    model = {k: t.full() for k, t in folders.tensors_of(open_file(path).root["model"], path).items()}
    model["decoder.layers.0.input_layernorm.weight"] += 1
    _namespace(path, model=model)
    opened = open_checkpoint(tmp_path / "copy")
    with pytest.raises(SurgeryError, match="should be the same on every rank"):
        opened.parts["layers.0.attn_norm"].full()


def test_extra_states_optimizers_and_shared_storages(tmp_path):
    """A distributed optimizer keeps all parameters in one buffer; TE adds tensors that are no weights."""
    folder = tmp_path / "iter_0000003/mp_rank_00"
    shutil.copytree(GOLDEN / MIXED / "checkpoint/iter_0000001/mp_rank_00", folder)
    path = folder / "model_optim_rng.pt"
    before = {k: t.full() for k, t in folders.tensors_of(open_file(path).root["model"], path).items()}
    buffer = torch.cat([t.reshape(-1) for t in reversed(before.values())])
    model, at = {}, buffer.numel()
    for name, tensor in before.items():
        at -= tensor.numel()
        model[name] = buffer[at : at + tensor.numel()].view(tensor.shape)
    model["decoder.layers.0.mlp.linear_fc1._extra_state"] = torch.zeros(5, dtype=torch.uint8)
    _namespace(path, model=model, optimizer={"state": {0: buffer.float()}}, rng_state=[1])
    torch.save({"param": buffer}, folder / "distrib_optim.pt")
    opened = open_checkpoint(folder.parent)
    want = open_checkpoint(GOLDEN / MIXED / "checkpoint")
    assert all(same_bits(opened.parts[k].full(), part.full()) for k, part in want.parts.items())
    assert {"optimizer", "rng_state", "mp_rank_00/distrib_optim.pt"} <= opened.ignored.keys()
    assert any("_extra_state" in name for name in opened.ignored)
    assert opened.details["optimizer"].startswith("1 x distrib_optim.pt, ")
    assert want.details["optimizer"] == "none"
    assert want.details["transformer_impl"] == "local"


@pytest.mark.parametrize(
    ("source", "flags", "text"),
    [
        ("llama", {"topology": Topology(tp=3)}, "cannot divide 4 key/value heads among 3 ranks"),
        ("llama", {"topology": Topology(pp=4)}, "cannot divide 6 layers among 4"),
        ("qwen3_moe", {"topology": Topology(ep=3)}, "cannot divide 8 experts"),
        ("llama", {"options": {"etp": "2"}}, "does not fit"),
        ("llama", {"options": {"vocab_multiple": "0"}}, "no positive whole number"),
        ("llama", {"options": {"iteration": "x"}}, "neither a number nor release"),
        ("olmo", {}, "clip"),
        ("olmo2", {}, "place of the norms: after"),
        ("gpt_neox", {}, "parallel"),
    ],
)
@pytest.mark.parametrize("to", ["megatron", "megatron-dist"])
def test_what_cannot_be_written(tiny_hf, tmp_path, source, flags, text, to):
    if to == "megatron-dist" and "topology" in flags and flags["topology"].ep > 1:
        pytest.skip("torch_dist files are tied to no ranks")
    with pytest.raises(SurgeryError, match=text):
        convert(tiny_hf(source), tmp_path / "out", to=to, **flags)


def test_iterations_come_through_other_formats(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / DIST / "checkpoint", source)
    state = dict(open_file(source / "iter_0000001/common.pt").root)
    args = {k: v for k, v in state["args"].state.items() if type(v) in (int, float, str, bool, list, type(None))}
    torch.save({"args": argparse.Namespace(**args), "iteration": 1234}, source / "iter_0000001/common.pt")
    convert(source, tmp_path / "hf", to="hf")
    convert(tmp_path / "hf", tmp_path / "back", to="megatron", options={"vocab_multiple": "64"})
    assert (tmp_path / "back" / folders.TRACKER).read_text() == "1234"
    convert(tmp_path / "hf", tmp_path / "release", to="megatron-dist", options={"iteration": "release"})
    assert open_checkpoint(tmp_path / "release").parts
    assert (tmp_path / "release" / folders.TRACKER).read_text() == "release"


@pytest.mark.parametrize("to", ["megatron", "megatron-dist", "olmo-core"])
def test_the_width_of_a_dense_layer_that_nobody_has(tmp_path, to):
    """A Qwen3-MoE of experts only states an intermediate_size all the same; formats without it hold the same model."""
    source = tiny.save("qwen3_moe", tmp_path / "source", mlp_only_layers=[])
    there = convert(source, tmp_path / "there", to=to)
    back = convert(tmp_path / "there", tmp_path / "back", to="hf", vocab_size=264)
    assert open_checkpoint(tmp_path / "back").spec.replace(ffn=0) == open_checkpoint(source).spec.replace(ffn=0)
    ours, theirs = load_file(tmp_path / "back/model.safetensors"), load_file(source / "model.safetensors")
    assert there.verified
    assert back.verified
    assert all(same_bits(ours[k], theirs[k]) for k in theirs)


def test_stacks_of_layers_and_experts_hold_what_they_claim(tmp_path):
    """A dozen tensors of torch_dist hold every expert of every layer."""
    sizes = {
        "h": 24,
        "v": 20,
        "l": 6,
        "g": 2,
        "n": 1,
        "half": 4,
        "f": 16,
        "e": 64,
        "m": 4,
        "num_experts": 64,
        "mlp_only_layers": [],
    }
    source = tiny.save("qwen3_moe", tmp_path / "hf", **sizes)
    convert(source, tmp_path / "dist", to="megatron-dist", options={"vocab_multiple": "1"})
    ours, theirs = open_checkpoint(tmp_path / "dist"), open_checkpoint(source)
    assert ours.spec.part_count() > 6 * 3 * 64
    assert all(same_bits(ours.parts[name].full(), part.full()) for name, part in theirs.parts.items())

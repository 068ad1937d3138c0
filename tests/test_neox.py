"""GPT-NeoX against checkpoints that its own code wrote, and against a naive account of what its code stores."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import surgery
from surgery.errors import AmbiguousError, ConfigError, FileError, LayoutError, SurgeryError, UsageError
from surgery.formats.account import OPTIMIZER
from surgery.formats.hf import format as hf
from surgery.formats.neox import config as neox_config
from surgery.formats.neox import files as neox_files
from surgery.formats.neox import format as neox
from surgery.formats.neox import releases as neox_releases
from surgery.formats.neox import table as neox_table
from surgery.formats.neox import write_config as neox_yaml
from surgery.formats.neox.releases import RELEASES, Evidence
from surgery.formats.neox.table import Spelling
from surgery.formats.registry import open_checkpoint
from surgery.formats.replicas import mean, share, total
from surgery.formats.table import Table
from surgery.formats.topology import Topology
from surgery.formats.weave import gather, shard, weave
from tests import oracle, reference, tiny
from tests.test_hf import mutants

GQA, SPLIT = "llama_gqa_seq_bf16_zero1_tp2", "pythia_pp1_tp2_splitbias"
NEW = {"release": "2024-11"}
STEP = "global_step250"


def golden(name: str) -> Path:
    return oracle.GOLDEN / "neox" / name / "checkpoint"


def options(name: str) -> dict[str, str]:
    return NEW if name == GQA else {}


def copy(name: str, folder: Path) -> Path:
    shutil.copytree(golden(name), folder)
    return folder


def edit(folder: Path, **changes: object) -> None:
    """Change keys of the YAML file of a copied checkpoint; None takes a key away."""
    path = next((folder / STEP / "configs").glob("*.yml"))
    config = {k.replace("-", "_"): v for k, v in yaml.safe_load(path.read_text()).items()}
    config = {k: v for k, v in {**config, **changes}.items() if v is not None}
    path.write_text(yaml.safe_dump(config))


# ------------------------------------------------------------------------------------- what the real program wrote


@pytest.mark.parametrize("name", [GQA, SPLIT])
def test_parts_compute_upstreams_logits(name):
    ids, want = oracle.expected(f"neox/{name}")
    assert oracle.gap(reference.logits(open_checkpoint(golden(name), options=options(name)), ids), want) < 2e-5


@pytest.mark.parametrize("name", [GQA, SPLIT])
def test_every_tensor_of_an_exact_conversion(name):
    """The digests were made without surgery, from upstream's tensors."""
    want = json.loads((oracle.GOLDEN / "neox" / name / "hf_tensors.json").read_text())
    checkpoint = open_checkpoint(golden(name), options=options(name))
    planned = hf.FORMAT.plan(checkpoint, Topology(), hf.FORMAT.with_defaults({}, "write"))
    got = {
        region.name: hashlib.sha256(bytes(oracle_bytes(region.tensor.full()))).hexdigest()[:16]
        for file in planned.files
        if file.name.endswith(".safetensors")
        for region in file.regions
    }
    assert got == want


def oracle_bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def test_there_and_back_gives_upstreams_files(tmp_path):
    """Through Hugging Face, which knows neither the iteration nor the padding: both come back."""
    source = golden(GQA)
    there = surgery.convert(source, tmp_path / "hf", to="hf", options=NEW)
    ids, want = oracle.expected(f"neox/{GQA}")
    assert oracle.gap(oracle.hf_logits(tmp_path / "hf", ids), want) < 2e-5
    back = surgery.convert(tmp_path / "hf", tmp_path / "back", to="neox", topology=Topology(tp=2, pp=0))
    assert back.content_digest == there.content_digest
    assert (tmp_path / "back" / "latest").read_text() == (source / "latest").read_text() == STEP
    for rank in range(2):
        ours, theirs = (module(p / STEP / f"mp_rank_{rank:02d}_model_states.pt") for p in (tmp_path / "back", source))
        assert ours.keys() == theirs.keys()
        assert all(oracle.same_bits(ours[k], theirs[k]) for k in theirs)
    again = open_checkpoint(tmp_path / "back")  # what surgery wrote says itself how to read it
    assert again.details["iteration"] == 250
    assert again.topology == Topology(tp=2, pp=0)
    config = yaml.safe_load((tmp_path / "back" / STEP / "configs" / "model.yml").read_text())
    theirs = yaml.safe_load(next((source / STEP / "configs").glob("*.yml")).read_text())
    same = ("num_layers hidden_size num_attention_heads num_kv_heads intermediate_size activation norm gpt_j_residual"
            " rms_norm_epsilon no_weight_tying make_vocab_size_divisible_by precision pipe_parallel_size vocab_file"
            " model_parallel_size use_bias_in_attn_linear use_bias_in_mlp tokenizer_type pos_emb").split()  # fmt: skip
    assert {k: config[k] for k in same} == {k: theirs[k] for k in same}


def module(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a rank file, by torch itself; upstream's hold numpy's random state too."""
    import numpy
    from torch.serialization import safe_globals

    names = [(numpy._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"), numpy.ndarray, numpy.dtype,
             numpy.dtypes.UInt32DType]  # fmt: skip
    with safe_globals(names):
        return torch.load(path, map_location="cpu", weights_only=True)["module"]


@pytest.mark.slow
def test_between_parallel_sizes_and_kinds_of_files(tmp_path):
    digests, at = set(), golden(SPLIT)
    for i, sizes in enumerate([Topology(tp=4, pp=2), Topology(tp=1, pp=0), Topology(tp=8, pp=1), Topology(tp=2, pp=0)]):
        report = surgery.convert(at, tmp_path / str(i), to="neox", topology=sizes)
        digests.add(report.content_digest)
        at = tmp_path / str(i)
        assert len(list((at / STEP).glob("mp_rank_*"))) == max(sizes.pp, 1) * sizes.tp
        assert len(list((at / STEP).glob("layer_*"))) == (7 * sizes.tp if sizes.pp else 0)
        assert open_checkpoint(at).topology == sizes
    assert len(digests) == 1
    training = yaml.safe_load((at / STEP / "configs" / "training.yml").read_text())
    assert training["finetune"] is True
    assert training["optimizer"]["params"]["eps"] == 1e-8  # the source's own settings travel along


def test_no_pipeline_stages_is_refused_elsewhere(tmp_path):
    with pytest.raises(UsageError, match="hf checkpoints have no --pp 0"):
        surgery.convert(golden(SPLIT), tmp_path / "hf", to="hf", topology=Topology(pp=0))
    with pytest.raises(UsageError, match="neox checkpoints have no --tp 0"):
        surgery.convert(golden(SPLIT), tmp_path / "x", to="neox", topology=Topology(tp=0))


def test_details_and_what_is_left_out():
    checkpoint = open_checkpoint(golden(GQA), options=NEW)
    assert checkpoint.details["iteration"] == 250
    assert checkpoint.details["ds_version"] == "0.19.8"
    assert "sequential" in str(checkpoint.details["layout"])
    assert checkpoint.details["query_key_value"] == "layout C"
    assert "np_rng_state" in checkpoint.ignored
    assert "numpy.ndarray" in checkpoint.globals
    assert checkpoint.spec.norm_eps == 1e-5
    assert open_checkpoint(golden(GQA) / STEP, options=NEW).spec == checkpoint.spec


def test_optimizer_files_are_reported(tmp_path):
    folder = copy(GQA, tmp_path / "run")
    torch.save({"optimizer_state_dict": {}}, folder / STEP / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (folder / "zero_to_fp32.py").write_text("raise SystemExit('executed')")
    checkpoint = open_checkpoint(folder, options=NEW)
    name = f"{STEP}/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    assert checkpoint.ignored[name] == OPTIMIZER
    assert checkpoint.ignored["zero_to_fp32.py"] == "the trainer's own state, which is not converted"
    assert any("fp32 copies of the weights, which only --optimizer converts" in note for note in checkpoint.notes)


# ------------------------------------------------------------------------------------- two readings of the same files


def test_grouped_queries_are_not_guessed(tmp_path):
    with pytest.raises(AmbiguousError, match="two ways that the files do not tell apart") as caught:
        open_checkpoint(golden(GQA))
    assert caught.value.readings == ({"release": "2024-09"}, {"release": "2024-11"})
    assert "-O release=2024-09" in str(caught.value)
    assert "-O release=2024-11" in str(caught.value)
    ids, want = oracle.expected(f"neox/{GQA}")
    gaps = [oracle.gap(reference.logits(open_checkpoint(golden(GQA), options=o), ids), want) for o in
            ({"release": "2024-09"}, {"qkv": "B"}, {"qkv": "C"}, {"release": "2024-09", "qkv": "C"})]  # fmt: skip
    assert min(gaps[:2]) > 1
    assert max(gaps[2:]) < 2e-5


def test_evidence_decides_before_options():
    spec = open_checkpoint(golden(GQA), options=NEW).spec
    seen = Evidence(2, "linear", True, 512, 64, 96, False, False, False, True)

    def choose(config=(), qkv="auto", release="auto", **changes):
        measures = spec.replace(**{k: v for k, v in changes.items() if k in ("kv_heads", "group", "head_dim")})
        found = dataclasses.replace(seen, **{k: v for k, v in changes.items() if k in ("mlp", "mark")})
        return neox_releases.choose_qkv(dict(config), found, measures, "x", qkv=qkv, release=release)[0]

    assert choose(mlp="w") == "B"
    assert choose({"attention_type": "groupedquery"}, release="2024-11") == "B"
    assert choose(mark="2024-09", release="2024-11") == "B"
    assert choose(mark="2024-11") == "C"
    assert choose(head_dim=6) == "C"  # four queries cannot share six rows of a key
    assert choose(kv_heads=8, group=1) == "A"
    assert choose(kv_heads=8, group=1, qkv="B") == "A"
    assert choose(kv_heads=8, group=1, qkv="C") == "C"  # as upstream's convert_hf_llama_to_neox.py writes it by mistake
    with pytest.raises(ConfigError, match="-O qkv=A, but 8 heads share 2"):
        choose(qkv="A")
    for release in ("llemma", "2024-03"):  # these do not have such names, so they decide nothing
        with pytest.raises(AmbiguousError):
            choose(release=release)


# ------------------------------------------------------------------------------------- a naive account of upstream


def stored(weights: dict[str, torch.Tensor], release: str, tp: int, *, heads: int, groups: int, serial: bool) -> list:
    """What each rank's modules hold: GPT-NeoX's formulas, written out on Hugging Face's tensors."""
    r = RELEASES[release]
    ranks: list[dict[str, torch.Tensor]] = [{} for _ in range(tp)]
    llama = "model.norm.weight" in weights
    layers = 1 + max(int(k.split(".layers.")[1].split(".")[0]) for k in weights if ".layers." in k)
    top, norm, head = ("model.", "norm", "lm_head") if llama else ("gpt_neox.", "final_layer_norm", "embed_out")
    embed = weights[top + ("embed_tokens" if llama else "embed_in") + ".weight"]

    def put(name: str, pieces: list[torch.Tensor]) -> None:
        for rank, piece in zip(ranks, pieces, strict=True):
            rank[name] = piece

    def everywhere(name: str, tensor: torch.Tensor) -> None:
        put(name, [tensor] * tp)

    def summed(name: str, tensor: torch.Tensor) -> None:
        """Equal shares; of the smallest fp16 numbers, which have no such part, the first rank has what is left over."""
        each = tensor if serial else tensor / tp
        rest = tensor if serial else (tensor.float() - each.float() * (tp - 1)).to(tensor.dtype)
        put(name, [rest, *[each] * (tp - 1)])

    def norms(ours: str, theirs: str) -> None:
        everywhere(f"{ours}.{'scale' if llama else 'weight'}", weights[f"{theirs}.weight"])
        if not llama:
            everywhere(f"{ours}.bias", weights[f"{theirs}.bias"])

    put("0.word_embeddings.weight", list(embed.chunk(tp)))
    for i in range(layers):
        at, w = f"{i + 2}.", f"{top}layers.{i}."
        norms(at + "input_layernorm", w + "input_layernorm")
        norms(at + "post_attention_layernorm", w + "post_attention_layernorm")
        if llama:
            q, k, v = (weights[f"{w}self_attn.{x}_proj.weight"] for x in "qkv")
            dim, width = q.shape[0] // heads, q.shape[1]
            for rank in range(tp):
                ql, kl, vl = (t.chunk(tp)[rank] for t in (q, k, v))
                n = heads // tp
                if groups == heads:
                    per_head = zip(*(t.reshape(n, dim, width) for t in (ql, kl, vl)), strict=True)
                    packed = torch.cat([row for triple in per_head for row in triple])
                elif r.gqa == "B":
                    part = dim * groups // heads  # rows of k that each query head carries
                    packed = torch.cat([torch.cat([ql[j * dim : (j + 1) * dim], kl[j * part : (j + 1) * part],
                                                   vl[j * part : (j + 1) * part]]) for j in range(n)])  # fmt: skip
                else:
                    packed = torch.cat([ql, kl, vl])
                ranks[rank][at + "attention.query_key_value.weight"] = packed
            put(at + "attention.dense.weight", list(weights[w + "self_attn.o_proj.weight"].chunk(tp, 1)))
            gate, up, down = (weights[f"{w}mlp.{x}_proj.weight"] for x in ("gate", "up", "down"))
            if r.mlp == "linear":
                pairs = zip(up.chunk(tp), gate.chunk(tp), strict=True)
                put(at + "mlp.linear1.weight", [torch.cat(pair) for pair in pairs])
                put(at + "mlp.linear2.weight", list(down.chunk(tp, 1)))
            else:
                put(at + "mlp.w1.weight", list(gate.chunk(tp)))
                put(at + "mlp.w3.weight", list(up.chunk(tp)))
                put(at + "mlp.w2.weight", list(down.chunk(tp, 1)))
        else:
            first, second = ("linear1", "linear2") if r.mlp == "linear" else ("dense_h_to_4h", "dense_4h_to_h")
            for ours, theirs in (("attention.query_key_value", "attention.query_key_value"),
                                 (f"mlp.{first}", "mlp.dense_h_to_4h")):  # fmt: skip
                for kind in ("weight", "bias"):
                    put(f"{at}{ours}.{kind}", list(weights[f"{w}{theirs}.{kind}"].chunk(tp)))
            for ours, theirs in (("attention.dense", "attention.dense"), (f"mlp.{second}", "mlp.dense_4h_to_h")):
                put(f"{at}{ours}.weight", list(weights[f"{w}{theirs}.weight"].chunk(tp, 1)))
                summed(f"{at}{ours}.bias", weights[f"{w}{theirs}.bias"])
    norms(f"{layers + 3}.norm", top + norm)
    if head + ".weight" in weights:
        put(f"{layers + 4}.final_linear.weight", list(weights[head + ".weight"].chunk(tp)))
    return ranks


MODELS = {
    "mha": ("llama", {"g": 12, "n": 1}),
    "gqa": ("llama", {"g": 4, "n": 2, "h": 80}),
    "wide": ("llama", {"g": 4, "n": 2, "h": 80, "f": 256}),
    "wide_mha": ("llama", {"g": 12, "n": 1, "f": 512}),
    "parallel": ("gpt_neox", {"f": 480}),
    "serial_tied": ("gpt_neox", {"use_parallel_residual": False, "tie_word_embeddings": True,
                                 "hidden_act": "gelu_fast"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            family, changes = MODELS[name]
            dtype = "float16" if name == "parallel" else "float32"
            made[name] = tiny.save(family, tmp_path_factory.mktemp(name) / name, dtype, **changes)
        return made[name]

    return get


WRITTEN = [("mha", "2024-11", 2, 1), ("gqa", "2024-11", 2, 0), ("gqa", "2024-09", 2, 3), ("gqa", "2024-03", 4, 0),
           ("wide", "llemma", 2, 1), ("wide_mha", "2023-05", 4, 1), ("parallel", "2024-11", 2, 1),
           ("parallel", "llemma", 4, 0), ("serial_tied", "2024-11", 2, 2)]  # fmt: skip


@pytest.mark.parametrize(("model", "release", "tp", "pp"), WRITTEN)
def test_written_as_upstream_stores_it(model, release, tp, pp, models, tmp_path):
    source, out = models(model), tmp_path / "out"
    there = surgery.convert(source, out, to="neox", topology=Topology(tp=tp, pp=pp), options={"release": release})
    spec = open_checkpoint(source).spec
    weights = load_file(source / "model.safetensors")
    want = stored(weights, release, tp, heads=spec.heads, groups=spec.kv_heads, serial=not spec.parallel)
    step = out / "global_step0"
    for rank in range(tp):
        got = {}
        for path in sorted(step.glob(f"layer_*-model_{rank:02d}-model_states.pt")):
            prefix = str(int(path.name[6:8]))
            got |= {f"{prefix}.{k}": t for k, t in torch.load(path, weights_only=True).items()}
        if not pp:
            state = torch.load(step / f"mp_rank_{rank:02d}_model_states.pt", weights_only=True)["module"]
            got = {k.removeprefix("sequential."): t for k, t in state.items()}
        buffers = {k: got.pop(k) for k in list(got) if k.endswith("inv_freq")}
        assert got.keys() == want[rank].keys()
        assert all(oracle.same_bits(got[k], want[rank][k]) for k in got), [
            k for k in got if not oracle.same_bits(got[k], want[rank][k])
        ]
        assert len(buffers) == (spec.layers if RELEASES[release].buffer else 0)
        turning = int(spec.head_dim * spec.rope.fraction)
        for buffer in buffers.values():
            angles = torch.tensor([spec.rope.base ** (-i / turning) for i in range(0, turning, 2)])
            assert torch.allclose(buffer.float(), angles, rtol=1e-3)
    again = surgery.convert(out, tmp_path / "again", to="hf")  # no option: the files say which release they are for
    assert again.content_digest == there.content_digest
    back = load_file(tmp_path / "again" / "model.safetensors")
    assert back.keys() == weights.keys()
    assert all(oracle.same_bits(back[k], weights[k]) for k in weights)


def test_rank_files_hold_what_deepspeed_asks_for(models, tmp_path):
    surgery.convert(models("mha"), tmp_path / "x", to="neox", topology=Topology(tp=2, pp=2))
    states = [torch.load(p, weights_only=True) for p in sorted((tmp_path / "x" / "global_step0").glob("mp_rank_*"))]
    assert len(states) == 4
    for state in states:
        assert state["module"] is None
        assert state["optimizer"] == {}
        assert (state["dp_world_size"], state["mp_world_size"]) == (1, 4)
        assert (state["global_steps"], state["skipped_steps"], state["iteration"]) == (0, 0, 0)
    config = yaml.safe_load((tmp_path / "x" / "global_step0" / "configs" / "model.yml").read_text())
    args = states[0]["args"]
    rows = args.pop("padded_vocab_size")
    assert rows == 264
    assert args == {k: config[k] for k in args}  # GPT-NeoX compares them and stops if they differ


# ------------------------------------------------------------------------------------- mistakes in the tables


@pytest.mark.parametrize(("model", "release", "tp", "pp"), [WRITTEN[i] for i in (1, 2, 5, 6, 8)])
def test_a_mistake_in_any_row_shows(model, release, tp, pp, models):
    """Every row with its parts, axes or cuts exchanged gives other tensors than the naive account."""
    checkpoint = open_checkpoint(models(model))
    spec, r = checkpoint.spec, RELEASES[release]
    weights = load_file(models(model) / "model.safetensors")
    want = stored(weights, release, tp, heads=spec.heads, groups=spec.kv_heads, serial=not spec.parallel)
    how = Spelling(neox_yaml.spelling_of_mlp(spec, r), r.gqa if spec.group > 1 else "A", tp)
    table, topology = neox_table.table(spec, how), Topology(tp=tp)

    def agrees(row, name_of) -> bool:
        binds = list(row.binds(spec))
        for bind in binds:
            whole = weave(row, bind, checkpoint.parts, spec, spec.sizes)
            for rank in range(tp):
                got = shard(row, whole, rank, tp).tensor
                theirs = want[rank].get(name_of.named(bind))
                if theirs is None or got.shape != theirs.shape or not oracle.same_bits(got.full(), theirs):
                    return False
        return bool(binds)

    tried = 0
    for row in table.rows:
        live = (row.when is None or row.when(spec, topology)) and next(row.binds(spec), None) is not None
        if not live:
            continue
        assert agrees(row, row), row.name
        cuts = () if row.summed else ("", "g", "f", "v", "h", "t")  # what is summed is not cut
        wrong = [dataclasses.replace(row, cut=c) for c in cuts if c != row.cut]
        wrong += [dataclasses.replace(row, summed=True)] if not row.cut and not row.summed else []
        wrong += [dataclasses.replace(row, summed=False)] if row.summed else []
        wrong += [dataclasses.replace(row, first=0)] if row.first else []
        if len(row.parts) == 3:
            wrong.append(dataclasses.replace(row, parts=(row.parts[0], row.parts[2], row.parts[1])))
        if row.views:
            plain = tuple(tuple(reversed(v)) if len(v) > 1 else (tuple(reversed(v[0])),) for v in row.views)
            wrong.append(dataclasses.replace(row, views=plain))
        for mutant in [*mutants(row), *wrong]:
            if row.cut == "t" and dataclasses.replace(mutant, layout=row.layout) == row:
                continue  # where an axis lies that has one element on every rank makes no difference
            tried += 1
            try:
                assert not agrees(mutant, mutant if mutant.first != row.first else row), f"{row.name} as {mutant}"
            except (SurgeryError, ValueError, KeyError):
                continue
            except AssertionError as error:
                if "as Row" in str(error):
                    raise
    assert tried > 60


def test_a_mistake_in_reading_biases_shows():
    """The sum of split biases is the model's bias; one rank's, or their mean, is not."""
    ids, want = oracle.expected(f"neox/{SPLIT}")
    checkpoint = open_checkpoint(golden(SPLIT))
    opened = neox_files.open_files(neox_files.find(golden(SPLIT)))
    table = neox_table.table(checkpoint.spec, Spelling("linear", "A", 2))
    for change in ({"summed": False}, {"summed": False, "averaged": True}):
        rows = tuple(dataclasses.replace(r, **change) if r.summed else r for r in table.rows)
        parts = gather(Table("neox", rows, neox_table.IGNORED), opened.shards, checkpoint.spec, Topology(tp=2)).parts
        wrong = dataclasses.replace(checkpoint, parts=parts)
        try:
            assert oracle.gap(reference.logits(wrong, ids), want) > 0.1
        except LayoutError as error:
            assert "should be the same on every rank" in str(error)  # noqa: PT017


# ------------------------------------------------------------------------------------- sums and copies over ranks


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.integers(1, 9),
    st.lists(st.integers(0, 65535), min_size=1, max_size=16),
)
def test_shares_add_up_exactly(dtype, ranks, bits):
    """Every bit pattern, so also the smallest numbers, whose halves are no numbers of the dtype, and infinities."""
    width = torch.tensor(bits, dtype=torch.int64)
    wide = (width << 16 | width) if dtype == torch.float32 else width
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    tensor = wide.to(kind).view(dtype)
    tensor = torch.where(tensor.isnan(), torch.ones_like(tensor), tensor)
    shares = [share(tensor, rank, ranks) for rank in range(ranks)]
    assert oracle.same_bits(total(*shares), tensor)
    normal = tensor.isfinite() & (tensor.abs() > torch.finfo(dtype).tiny * 16)
    if ranks in (2, 4, 8):  # as upstream stores it
        assert all(oracle.same_bits(s[normal], (tensor / ranks)[normal]) for s in shares)


def test_mean_leaves_equal_copies_alone():
    a, b = torch.tensor([0.1, 1.0, -0.0]), torch.tensor([0.1, 2.0, -0.0])
    assert oracle.same_bits(mean(a, b, b), torch.tensor([0.1, 5 / 3, -0.0]))


def test_norms_that_drifted_apart(tmp_path):
    folder = copy(SPLIT, tmp_path / "run")
    path = folder / STEP / "layer_03-model_01-model_states.pt"
    state = torch.load(path, weights_only=True)
    state["input_layernorm.weight"] += 0.5
    torch.save(state, path)
    with pytest.raises(LayoutError, match=r"(?s)3.input_layernorm.weight should be the same.*-O replicas=average"):
        surgery.convert(folder, tmp_path / "x", to="hf")
    checkpoint = open_checkpoint(folder, options={"replicas": "average"})
    assert any("not exact" in note for note in checkpoint.notes)
    plain = open_checkpoint(golden(SPLIT))
    name = "layers.1.attn_norm"
    assert torch.allclose(checkpoint.parts[name].full(), plain.parts[name].full() + 0.25)
    assert all(oracle.same_bits(checkpoint.parts[n].full(), plain.parts[n].full()) for n in plain.parts if n != name)


# ------------------------------------------------------------------------------------- the configuration, both ways

SEEN = Evidence(4, "linear", False, 512, 256, 192, True, True, True, True)
BASE = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 8, "max_position_embeddings": 64,
        "pos_emb": "rotary", "no_weight_tying": True}  # fmt: skip


def test_defaults_are_upstreams_and_named():
    reading = neox_config.read_config(BASE, "x", SEEN)
    spec = reading.spec
    assert (spec.norm, spec.norm_eps, spec.act, spec.parallel, spec.rope.base, spec.rope.fraction) == (
        "layer", 1e-5, "gelu", False, 10000.0, 1.0)  # fmt: skip
    note = next(n for n in reading.notes if "as GPT-NeoX takes it" in n)
    for word in ("layernorm_epsilon = 1e-05", "activation = 'gelu'", "rotary_pct = 1.0"):
        assert word in note
    rms = neox_config.read_config({**BASE, "norm": "rmsnorm"}, "x", SEEN).spec
    assert rms.norm_eps == 1e-8
    assert neox_config.read_config({**BASE, "bias_gelu_fusion": True}, "x", SEEN).spec.act == "gelu_tanh"
    tied = neox_config.read_config({**BASE, "no_weight_tying": None}, "x", dataclasses.replace(SEEN, head=False))
    assert tied.spec.tied


def test_several_files_with_mixed_keys(tmp_path):
    folder = copy(SPLIT, tmp_path / "run")
    configs = folder / STEP / "configs"
    for path in configs.glob("*.yml"):
        path.unlink()
    (configs / "model.yml").write_text("""{
  # a comment, and a comma at the end, as upstream's files have them
  "num-layers": 4, "hidden_size": 64, "num-attention_heads": 8, "max-position-embeddings": 64,
  "pos-emb": "rotary", "rotary-pct": 0.25, "layernorm-epsilon": 1e-05, "gpt_j-residual": True,
  "no-weight-tying": true, "bias_gelu_fusion": false,
}""")
    (configs / "local.yml").write_text("data-path: /data\nlog_dir: logs\nlaunch_missiles: true\ngpt-j-residual: true\n")
    with pytest.raises(ConfigError, match="'launch_missiles' \\(True\\) is not understood"):
        open_checkpoint(folder)
    checkpoint = open_checkpoint(folder, options={"allow_unknown": "launch_missiles"})
    assert checkpoint.spec == open_checkpoint(golden(SPLIT)).spec
    assert not any("data_path" in note for note in checkpoint.notes)
    (configs / "third.yml").write_text("gpt_j_residual: false\n")
    with pytest.raises(ConfigError, match=r"gpt_j_residual is False, but True in .*(model|local).yml"):
        open_checkpoint(folder)


def test_configs_from_elsewhere(tmp_path):
    folder = copy(SPLIT, tmp_path / "run")
    shutil.move(folder / STEP / "configs", tmp_path / "kept")
    with pytest.raises(FileError, match=r"(?s)holds no configs/\*.yml.*-O config="):
        open_checkpoint(folder)
    found = open_checkpoint(folder, options={"config": str(next((tmp_path / "kept").glob("*.yml")))})
    assert found.spec == open_checkpoint(golden(SPLIT)).spec
    with pytest.raises(UsageError, match="there is no file"):
        open_checkpoint(folder, options={"config": str(tmp_path / "none.yml")})


REFUSED = {
    "gpt_j_tied": (True, "one norm for attention and mlp"),
    "use_qk_layernorm": (True, "a norm of queries and keys"),
    "use_mup": (True, "maximal update"),
    "moe_num_experts": (8, "a mixture of experts"),
    "soft_prompt_tuning": ({"enabled": True}, "a trained prompt"),
    "num_unique_layers": (2, "share their weights"),
    "train_impl": ("rm", "a reward model"),
    "norm": ("scalenorm", "norm is 'scalenorm'"),
    "activation": ("mish", "activation is 'mish'"),
    "pos_emb": ("alibi", "pos_emb is 'alibi'"),
    "attention_config": ([[["local"], 4]], "layers of type 'local'"),
    "num_layers": (5, "num_layers is 5"),
    "num_attention_heads": (7, "hidden_size 64 does not give 7 heads"),
    "num_kv_heads": (2, "num_kv_heads is 2, but query_key_value has rows for 8"),
    "no_weight_tying": (False, "there is a final_linear.weight"),
    "hidden_size": ("64", "hidden_size is '64', not a whole number"),
    "rotary_pct": (2, "rotary_pct is 2 of heads"),
    "gpt_j_residual": ("yes", "not true or false"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_cannot_be_said_is_refused(key):
    value, why = REFUSED[key]
    with pytest.raises(ConfigError, match=why.replace("(", r"\(")):
        neox_config.read_config({**BASE, key: value}, "x", SEEN)


def test_the_release_that_drops_the_attention_is_refused(tmp_path):
    folder = copy(SPLIT, tmp_path / "run")
    edit(folder, use_bias_in_mlp=False)
    for path in (folder / STEP).glob("layer_0[2-5]-*"):
        state = torch.load(path, weights_only=True)
        torch.save({k: t for k, t in state.items() if not k.startswith("mlp") or "bias" not in k}, path)
    with pytest.raises(ConfigError, match="leaves out the attention's output"):
        open_checkpoint(folder)


def test_a_configuration_of_another_run_is_refused(tmp_path):
    folder = copy(SPLIT, tmp_path / "run")
    edit(folder, max_position_embeddings=128)
    with pytest.raises(ConfigError, match="max_position_embeddings is 128, but 64 in the checkpoint"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("config", "release", "mlp", "gated", "width", "want"),
    [
        ({"intermediate_size": 480, "mlp_multiple_of": 16}, "2024-11", "linear", True, 64, 160),
        ({"intermediate_size": 3 * 11008}, "2024-11", "linear", True, 4096, 11008),
        ({}, "2024-11", "linear", False, 64, 256),
        ({"expansion_factor": 2.5}, "2024-09", "linear", False, 64, 160),
        ({"intermediate_size": 14336}, "2024-03", "w", True, 4096, 14336),
        ({}, "2024-03", "w", True, 4096, 11008),
        ({"intermediate_size": 1}, "llemma", "w", True, 8192, 22016),
        ({}, "llemma", "dense", False, 64, 256),
        ({"intermediate_size": 1 << 400}, "2024-11", "linear", False, 64, 256),
    ],
)
def test_ffn_width(config, release, mlp, gated, width, want):
    assert neox_releases.ffn_width(config, RELEASES[release].ffn, mlp, gated, width) == want


def test_windows_are_one_wider_than_flash_says():
    """Flash attention sees `width` tokens before the token itself; only its layers have the window."""
    config = {**BASE, "sliding_window_width": 15, "attention_config": [[["flash", "global"], 2]]}
    spec = neox_config.read_config(config, "x", SEEN).spec
    assert spec.windows == (16, 0, 16, 0)
    written = neox_yaml.write_config(spec, RELEASES["2024-11"], tp=1, pp=1, multiple=1, dtype="float32")
    assert written["sliding_window_width"] == 15
    assert neox_config.read_config(written, "x", SEEN).spec.windows == spec.windows


MISFITS = [
    ("qwen2", "2024-11", {}, "biases for queries, keys and values only"),
    ("qwen3", "2024-11", {"h": 120}, r"query and key norms"),
    ("qwen3", "2024-11", {}, r"hidden_size 104 does not give 12 heads"),
    ("olmo2", "2024-11", {}, "place of the norms: after"),
    ("mixtral", "2024-11", {"h": 120, "sliding_window": None}, "experts: 8"),
    ("llama3", "2024-11", {}, "rope scaling|scaled as llama3"),
    ("llama", "2023-05", {}, "4 key/value heads for 12 heads"),
    ("llama", "2024-09", {}, "heads of width 10 that 3 queries cannot share evenly"),
    ("llama", "llemma", {}, "an ffn width of 144"),
    ("gpt_neox", "2024-03", {}, "an ffn width of 144"),
]


@pytest.mark.parametrize(("family", "release", "changes", "why"), MISFITS)
def test_what_a_release_cannot_hold_is_named(family, release, changes, why, tiny_hf, tmp_path):
    source = tiny.save(family, tmp_path / "source", **changes) if changes else tiny_hf(family)
    with pytest.raises(ConfigError, match=why):
        surgery.convert(source, tmp_path / "x", to="neox", options={"release": release})
    assert not (tmp_path / "x").exists()


def test_ranks_need_whole_heads(tiny_hf, tmp_path):
    with pytest.raises(LayoutError, match="cannot divide 4 key/value heads among 8 ranks"):
        surgery.convert(tiny_hf("llama"), tmp_path / "x", to="neox", topology=Topology(tp=8))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 8), st.one_of(st.none(), st.integers(1, 40000)))
def test_the_vocabulary_is_padded_to_the_rows_there_are(share_of_rank, tp, tokens):
    rows = share_of_rank * tp
    tokens = None if tokens is None or tokens > rows else tokens
    multiple = neox_yaml.vocab_multiple(rows, tp, tokens)
    for size in (tokens,) if tokens else (1, rows):
        assert math.ceil(size / (multiple * tp)) * multiple * tp == rows  # GPT-NeoX's own formula


def test_yaml_is_read_alike_by_everyone():
    config = {"eps": 1e-08, "other": 1.5e-7, "plain": 0.25, "flag": True, "nested": {"lr": 6e-4, "list": [[["a"], 2]]}}
    assert yaml.safe_load(neox_yaml.to_yaml(config)) == json.loads(json.dumps(config))


# ------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("gone", "why"),
    [
        ("layer_03-model_01-model_states.pt", "layer_03-model_01-model_states.pt missing"),
        ("layer_05-model_0*-model_states.pt", "num_layers is 4, but the files hold 3 layers"),
        ("layer_*-model_01-model_states.pt", "holds files of 1 tensor-parallel ranks, the run had 2"),
        ("layer_07-model_0*-model_states.pt", r"7.norm.{bias,weight} are missing \(on 2 of 2 ranks\)"),
        ("mp_rank_00_model_states.pt", "mp_rank_00_model_states.pt missing"),
    ],
)
def test_missing_files_are_named(gone, why, tmp_path):
    folder = copy(SPLIT, tmp_path / "run")
    for path in (folder / STEP).glob(gone):
        path.unlink()
    with pytest.raises(SurgeryError, match=why):
        open_checkpoint(folder)


def test_weights_that_are_not_read_are_refused(tmp_path):
    folder = copy(SPLIT, tmp_path / "run")
    (folder / STEP / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(b"")
    with pytest.raises(FileError, match="partitioned by ZeRO stage 3"):
        open_checkpoint(folder)
    (folder / STEP / "zero_pp_rank_0_mp_rank_00_model_states.pt").unlink()
    (folder / STEP / "layer_2_expert_0_mp_rank_00_model_states.pt").write_bytes(b"")
    with pytest.raises(FileError, match="the experts of a mixture"):
        open_checkpoint(folder)
    (folder / STEP / "layer_2_expert_0_mp_rank_00_model_states.pt").unlink()
    path = folder / STEP / "layer_02-model_00-model_states.pt"
    torch.save({**torch.load(path, weights_only=True), "attention.rpe.weight": torch.zeros(3)}, path)
    with pytest.raises(LayoutError, match=r"1 tensors have no place in a neox gpt_neox: 2.attention.rpe.weight"):
        open_checkpoint(folder)
    torch.save({**torch.load(path, weights_only=True), "odd": 7}, path)
    with pytest.raises(FileError, match="entries 'odd' are no plain tensors"):
        open_checkpoint(folder)
    (folder / "latest").write_text("../elsewhere")
    with pytest.raises(FileError, match="not a plain file name"):
        open_checkpoint(folder)
    (folder / "latest").write_text("global_step300")
    with pytest.raises(FileError, match="points to 'global_step300', which is no folder here"):
        open_checkpoint(folder)


def test_an_output_layer_cut_along_the_width(tmp_path):
    """Before 2.0 this was the default: every rank holds all rows, and its columns."""
    folder = copy(SPLIT, tmp_path / "run")
    paths = [folder / STEP / f"layer_08-model_0{i}-model_states.pt" for i in range(2)]
    whole = torch.cat([torch.load(p, weights_only=True)["final_linear.weight"] for p in paths])
    for path, piece in zip(paths, whole.chunk(2, 1), strict=True):
        torch.save({"final_linear.weight": piece.clone()}, path)
    assert oracle.same_bits(open_checkpoint(folder).parts["lm_head"].full(), whole)


def test_recognised_by_its_files_alone(tmp_path):
    assert neox.FORMAT.recognise(golden(SPLIT))
    assert neox.FORMAT.recognise(golden(GQA) / STEP)
    trainer = tmp_path / "checkpoint-500" / "global_step500"  # transformers' Trainer with DeepSpeed
    trainer.mkdir(parents=True)
    (trainer / "mp_rank_00_model_states.pt").write_bytes(b"")
    (trainer.parent / "latest").write_text("global_step500")
    assert not neox.FORMAT.recognise(trainer.parent)
    assert not neox.FORMAT.recognise(tmp_path)


# ------------------------------------------------------------------------------------- which reading makes sense

PROSE = " ".join(
    f"The {animal} sat on the {place} and looked at the {thing}." for animal in ("cat", "dog", "owl")
    for place in ("mat", "roof", "wall") for thing in ("moon", "rain", "road")
)  # fmt: skip


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A tiny model with grouped queries that has learnt a text by heart, as GPT-NeoX of 2024-09 packs it, unmarked."""
    folder = tmp_path_factory.mktemp("taught")
    (folder / "prose.txt").write_text(PROSE)
    tokens = tiny_tokenizer(folder / "tokenizer.json")
    torch.manual_seed(0)
    model = tiny.model("llama", l=2, g=4, n=2, h=80, f=160)
    optimizer, ids = torch.optim.AdamW(model.parameters(), 3e-3), torch.tensor([tokens.encode(PROSE).ids])
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=ids[:, :128], labels=ids[:, :128]).loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "hf")
    surgery.convert(folder / "hf", folder / "run", to="neox", topology=Topology(tp=2, pp=0),
                    tokenizer=folder / "tokenizer.json", options={"release": "2024-09"})  # fmt: skip
    for path in (folder / "run/global_step0").glob("mp_rank_*"):
        state = torch.load(path, weights_only=True)
        torch.save({k: v for k, v in state.items() if k != neox_files.MARK}, path)
    return folder


def tiny_tokenizer(path: Path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = sorted(set(PROSE.replace(".", " .").split()))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *words])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return tokenizer


def test_a_text_tells_the_readings_apart(taught):
    from click.testing import CliRunner

    from surgery.cli.main import main
    from surgery.verification.ambiguity import try_readings

    with pytest.raises(AmbiguousError):
        open_checkpoint(taught / "run")
    found = try_readings(taught / "run", taught / "prose.txt")
    losses = {one.flags: one.loss for one in found.readings}
    assert losses["-O release=2024-09"] < 1.2 < 2 < losses["-O release=2024-11"]
    assert found.best.flags == "-O release=2024-09"
    assert found.guess == pytest.approx(math.log(264))
    reported = CliRunner().invoke(
        main, ["inspect", str(taught / "run"), "--try-text", str(taught / "prose.txt"), "--json"]
    )
    assert json.loads(reported.stdout)["option"] == "-O release=2024-09"
    assert json.loads(reported.stdout)["readings"][0]["loss"] == losses["-O release=2024-09"]
    shown = CliRunner().invoke(main, ["inspect", str(taught / "run"), "--try-text", str(taught / "prose.txt"), "-O",
                                      "release=2024-11"])  # fmt: skip
    assert "release=2024-11" in shown.output
    assert "release=2024-09" not in shown.output  # an option that is given is not doubted
    alone = try_readings(taught / "hf", taught / "prose.txt", tokenizer=taught / "tokenizer.json")
    assert alone.best.options == {}
    assert alone.best.loss == losses["-O release=2024-09"]


def test_no_reading_is_named_where_none_makes_sense(taught, tmp_path):
    from surgery.verification.ambiguity import try_readings

    found = try_readings(golden(GQA), taught / "prose.txt")  # random weights
    assert found.best is None
    assert "no reading predicts this text" in found.verdict
    with pytest.raises(SurgeryError, match="has no tokenizer"):
        try_readings(taught / "hf", taught / "prose.txt")
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(FileError, match="holds no text"):
        try_readings(golden(GQA), tmp_path / "empty")
    with pytest.raises(FileError, match="is no file"):
        try_readings(golden(GQA), tmp_path / "none")


@pytest.mark.parametrize(
    ("family", "hint"), [("granite", None), ("llama", "another release holds it: -O release=2024-11")]
)
def test_a_refusal_names_the_releases_that_hold_the_model(family, hint, tiny_hf, tmp_path):
    with pytest.raises(ConfigError, match="cannot hold") as caught:
        surgery.convert(tiny_hf(family), tmp_path / "out", to="neox", options={"release": "2023-05"})
    assert caught.value.hint == hint


def test_where_gpt_neox_looks_for_the_tokenizer_is_told(tiny_hf, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny_hf("llama"), source)
    model = {"type": "WordLevel", "vocab": {f"t{i}": i for i in range(264)}, "unk_token": "t0"}
    (source / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model, "added_tokens": []}))
    notes = surgery.convert(source, tmp_path / "out", to="neox").notes
    (note,) = [note for note in notes if "vocab_file" in note]
    assert "tokenizer.json where it is started" in note
    assert '"vocab_file": "tokenizer.json"' in next((tmp_path / "out").rglob("model.yml")).read_text()

"""OLMo-core against checkpoints that its own code wrote, and against a naive account of what its code stores.

The goldens are what `tests/upstream/make_olmo_core_goldens.py` writes with ai2-olmo-core 3.0.0.
"""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import surgery
from surgery.errors import ConfigError, FileError, LayoutError, SurgeryError, UsageError
from surgery.formats.base import Checkpoint
from surgery.formats.olmo_core import config as olmo_core_config
from surgery.formats.olmo_core import format as olmo_core
from surgery.formats.olmo_core import table as olmo_core_table
from surgery.formats.olmo_core.config import Variant
from surgery.formats.registry import open_checkpoint
from surgery.formats.table import Table
from surgery.formats.topology import Rank, Topology
from surgery.formats.weave import gather
from tests import oracle, reference
from tests.test_hf import mutants

CASES = ("olmo2", "olmo2-fsdp", "olmo3-yarn", "complex-head-norm", "complex-full-norm", "biases-clip", "fused",
         "flex-default", "dropless-mixed")  # fmt: skip
IDS = torch.randint(0, 264, (2, 20), generator=torch.Generator().manual_seed(3))


def golden(name: str) -> Path:
    return oracle.GOLDEN / "olmo_core" / name / "checkpoint"


def copy(name: str, folder: Path) -> Path:
    shutil.copytree(golden(name), folder)
    return folder


def config_of(name: str) -> dict:
    return json.loads((golden(name) / "config.json").read_text())


def same(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether two checkpoints hold the same parts, bit for bit."""
    return a.parts.keys() == b.parts.keys() and all(
        oracle.same_bits(a.parts[n].full(), b.parts[n].full()) for n in a.parts
    )


class Stub:
    """Stands in for the classes in `.metadata`; keeps what they were given."""

    def __init__(self, *args: object) -> None:
        self.args = args

    def __setstate__(self, state: object) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


class Trusting(pickle.Unpickler):
    """Reads a golden's `.metadata` without OLMo-core, whose class of records torch's reader cannot do without."""

    def find_class(self, module: str, name: str) -> object:
        return (
            super().find_class(module, name)
            if module.split(".")[0] == "torch" and "checkpoint" not in module
            else type(name, (Stub,), {})
        )


def upstream_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a DCP folder, chunk by chunk, without any code of surgery."""
    with open(folder / ".metadata", "rb") as file:
        metadata = Trusting(file).load()
    out: dict[str, torch.Tensor] = {}
    for index, info in metadata.storage_data.items():
        with open(folder / info.relative_path, "rb") as file:
            file.seek(info.offset)
            chunk = torch.load(io.BytesIO(file.read(info.length)), weights_only=True)
        record = metadata.state_dict_metadata[index.fqn]
        size = tuple(record.size)
        whole = out.setdefault(index.fqn, torch.full(size, torch.nan, dtype=chunk.dtype))
        start = tuple(index.offset) if index.offset is not None else (0,) * len(size)
        whole[tuple(slice(a, a + n) for a, n in zip(start, chunk.shape, strict=True))] = chunk
    assert not any(t.isnan().any() for t in out.values())
    return {name.removeprefix("model."): t for name, t in out.items()}


def torchs_tensors(folder: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a DCP folder that torch's own reader can read."""
    dcp_to_torch_save(folder, tmp_path / "all.pt")
    return torch.load(tmp_path / "all.pt", weights_only=True)["model"]


# ------------------------------------------------------------------------------------- what the real program wrote


@pytest.mark.parametrize("name", CASES)
def test_parts_compute_upstreams_logits(name):
    ids, want = oracle.expected(f"olmo_core/{name}")
    assert oracle.gap(reference.logits(open_checkpoint(golden(name)), ids), want) < 2e-5


# no class of transformers is like the others
@pytest.mark.parametrize("name", [c for c in CASES if c not in ("biases-clip", "complex-head-norm", "dropless-mixed")])
def test_through_hugging_face(name, tmp_path):
    """transformers computes the same logits, and what comes back has the same parts."""
    there = surgery.convert(golden(name), tmp_path / "hf", to="hf")
    ids, want = oracle.expected(f"olmo_core/{name}")
    assert oracle.gap(oracle.hf_logits(tmp_path / "hf", ids), want) < 2e-5
    back = surgery.convert(tmp_path / "hf", tmp_path / "back", to="olmo-core")
    assert back.content_digest == there.content_digest
    again = open_checkpoint(tmp_path / "back")
    source = open_checkpoint(golden(name))
    assert same(again, source)
    assert not {k for k in again.spec.differences(source.spec) if k not in ("family", "true_vocab")}


@pytest.mark.parametrize("name", ["olmo2-fsdp", "flex-default", "olmo3-yarn", "biases-clip", "dropless-mixed"])
def test_there_and_back_gives_upstreams_tensors(name, tmp_path):
    """Written again, torch's own reader finds every tensor of upstream's checkpoint, bit for bit."""
    experts = "default" if name == "flex-default" else "dropless"
    surgery.convert(golden(name), tmp_path / "out", to="olmo-core", options={"experts": experts})
    ours = torchs_tensors(tmp_path / "out" / "model_and_optim", tmp_path)
    theirs = upstream_tensors(golden(name) / "model_and_optim")
    theirs = {k: t for k, t in theirs.items() if not k.endswith("batch_size_per_expert")}
    assert ours.keys() == theirs.keys()
    assert all(oracle.same_bits(ours[k], theirs[k]) for k in theirs)
    ours_said, said = (json.loads((p / "config.json").read_text()) for p in (tmp_path / "out", golden(name)))
    assert ours_said["dataset"] == said["dataset"]
    for i, (mine, want) in enumerate(zip(blocks(ours_said), blocks(said), strict=True)):
        assert not differences(want, mine), (i, differences(want, mine))


def blocks(config: dict) -> list[dict]:
    model = config["model"]
    return [model.get("block_overrides", {}).get(str(i), model["block"]) for i in range(model["n_layers"])]


TRAINING = {"backend", "capacity_factor", "lb_loss_granularity", "scale_loss_by_num_layers", "z_loss_weight",
            "lb_loss_weight", "full_precision", "bias_gamma", "sliding_window", "attention_rescale_factor"}  # fmt: skip


def differences(want: dict, got: dict, at: str = "") -> list[str]:
    """What upstream's config of a block says and ours does not, leaving out what only matters in training."""
    found = []
    for key, value in want.items():
        if key in TRAINING:
            continue
        if isinstance(value, dict):
            found += differences(value, got.get(key) or {}, f"{at}.{key}")
        elif got.get(key, value if value in (None, False) else None) != value:
            found.append(f"{at}.{key}: {value} / {got.get(key)}")
    return found


def test_neighbours_become_halves_and_are_said_so(tmp_path):
    """Complex rotary embeddings are written as the default kind: another order of the rows, the same function."""
    surgery.convert(golden("complex-full-norm"), tmp_path / "out", to="olmo-core")
    ours = torchs_tensors(tmp_path / "out" / "model_and_optim", tmp_path)
    theirs = upstream_tensors(golden("complex-full-norm") / "model_and_optim")
    rows = torch.arange(24).view(4, 3, 2).transpose(1, 2).reshape(-1)  # per head: evens, then odds
    name = "blocks.1.attention.w_q.weight"
    assert oracle.same_bits(ours[name], theirs[name][rows])
    norm = "blocks.1.attention.q_norm.weight"
    assert oracle.same_bits(ours[norm], theirs[norm][rows])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model"]["block"]["sequence_mixer"]["rope"]["name"] == "default"
    assert open_checkpoint(golden("complex-full-norm")).details["rotary pairs"] == "neighbours (complex)"


def test_a_wrong_reading_shows():
    """What names and shapes do not tell, the config does: each of these computes other logits."""
    for name, wrong in (
        ("complex-full-norm", Variant()),
        ("complex-head-norm", Variant()),
        ("olmo2", Variant(interleaved=True)),
    ):
        ids, want = oracle.expected(f"olmo_core/{name}")
        assert oracle.gap(reference.logits(misread(name, olmo_core_table.table(wrong)), ids), want) > 0.1
    with pytest.raises(ConfigError, match="complex rotary embeddings with a fused attention"):
        olmo_core_table.table(Variant(interleaved=True, fused=True))


def misread(name: str, table: Table) -> Checkpoint:
    """A golden, read by another table."""
    checkpoint = open_checkpoint(golden(name))
    stored = surgery.open_tensors(golden(name) / "model_and_optim")
    tensors = {k.removeprefix("model."): t for k, t in stored.items()}
    parts = gather(table, {Rank(): tensors}, checkpoint.spec, Topology()).parts
    return dataclasses.replace(checkpoint, parts=parts)


def mistakes(row) -> list:
    """Plausible mistakes of a row, at least one for every row."""
    found = mutants(row)
    swaps = {"k.bias": "v.bias", "v.bias": "k.bias", "gate.bias": "up.bias", "up.bias": "gate.bias", "attn.v": "attn.k",
             "attn_norm.bias": "mlp_norm.bias", "mlp_norm.bias": "attn_norm.bias", "final_norm.bias": "final_norm",
             "mlp.up": "mlp.gate", "k_norm": "q_norm", "k_head_norm": "q_head_norm",
             "mlp_norm": "attn_norm", "mlp_post_norm": "attn_post_norm", "lm_head": "embed", "final_norm": "embed",
             "o.bias": "v.bias", "mlp.down.bias": "attn.o.bias", "router.bias": "router",
             "q.bias": "k.bias", ".up": ".gate"}  # fmt: skip
    for old, new in swaps.items():
        if len(row.parts) == 1 and row.parts[0].endswith(old):
            found.append(dataclasses.replace(row, parts=(row.parts[0].removesuffix(old) + new,)))
            break
    if len(row.parts) == 3:
        found.append(dataclasses.replace(row, parts=(row.parts[0], row.parts[2], row.parts[1])))
    if len(row.layout) == 2:
        found.append(dataclasses.replace(row, layout=row.layout[::-1]))
        if len(row.layout[0]) == 2 and row.layout[0][0] == "e":
            e, rows = row.layout[0]
            found.append(dataclasses.replace(row, layout=((e, *row.layout[1]), (rows,))))
    flat = [a for group in row.layout for a in group]
    if "two" in flat:
        found.append(dataclasses.replace(row, layout=tuple(tuple(swap(a) for a in g) for g in row.layout)))
    if row.layout == (("e", "h"),):
        found.append(dataclasses.replace(row, layout=(("h", "e"),)))
    return found


def swap(axis: str) -> str:
    return {"two": "half", "half": "two"}.get(axis, axis)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["olmo2", "biases-clip", "complex-full-norm", "complex-head-norm", "fused", "flex-default", "dropless-mixed"],
)
def test_a_mistake_in_any_row_shows(name):
    checkpoint = open_checkpoint(golden(name))
    found = olmo_core_config.read_model(config_of(name), "config.json")
    ids, want = oracle.expected(f"olmo_core/{name}")
    table = olmo_core_table.table(found.variant)
    tried = 0
    for row in table.rows:
        live = (row.when is None or row.when(checkpoint.spec, Topology())) and next(row.binds(checkpoint.spec), None)
        if live is None or live is False or row.copy:
            continue
        wrong = mistakes(row)
        assert wrong, f"no mistake is tried with {row.name}"
        for mutant in wrong:
            tried += 1
            rows = tuple(mutant if r is row else r for r in table.rows)
            try:
                gap = oracle.gap(reference.logits(misread(name, Table("x", rows)), ids), want)
            except (SurgeryError, ValueError):
                continue
            assert gap > 1e-3, f"{row.name} as {mutant}"
    assert tried >= 15


# ------------------------------------------------------------------------------------- a naive account of upstream

ATTENTION = {"q_proj": "w_q", "k_proj": "w_k", "v_proj": "w_v", "o_proj": "w_out", "q_norm": "q_norm",
             "k_norm": "k_norm"}  # fmt: skip
FEED = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def stored(w: dict[str, torch.Tensor], experts: str, post: bool) -> dict[str, torch.Tensor]:
    """What OLMo-core's state dict holds: its modules' formulas, written out on Hugging Face's tensors."""
    w = {k.replace("block_sparse_moe", "mlp"): t for k, t in w.items()}
    out = {"embeddings.weight": w["model.embed_tokens.weight"]}
    out["lm_head.w_out.weight"] = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    if "model.norm.weight" in w:
        out["lm_head.norm.weight"] = w["model.norm.weight"]
    layers = 1 + max(int(k.split(".")[2]) for k in w if k.startswith("model.layers."))
    after = ("post_attention_layernorm", "post_feedforward_layernorm")
    norms = after if post else ("input_layernorm", "post_attention_layernorm")
    for i in range(layers):
        at, src = f"blocks.{i}.", f"model.layers.{i}."
        for ours, theirs in zip(("attention_norm", "feed_forward_norm"), norms, strict=True):
            if f"{src}{theirs}.weight" in w:
                out[f"{at}{ours}.weight"] = w[f"{src}{theirs}.weight"]
        for theirs, ours in ATTENTION.items():
            if f"{src}self_attn.{theirs}.weight" in w:
                out[f"{at}attention.{ours}.weight"] = w[f"{src}self_attn.{theirs}.weight"]
        if f"{src}mlp.gate.weight" not in w:
            for theirs, ours in FEED.items():
                out[f"{at}feed_forward.{ours}.weight"] = w[f"{src}mlp.{theirs}.weight"]
            continue
        router = w[f"{src}mlp.gate.weight"]
        out[f"{at}feed_forward_moe.router.weight"] = router.reshape(-1)
        for theirs, ours in FEED.items():
            names = (theirs, MIXTRAL[theirs])
            each = [next(w[k] for n in names if (k := f"{src}mlp.experts.{e}.{n}.weight") in w)
                    for e in range(len(router))]  # fmt: skip
            turned = ours == "w2" or experts == "default"
            out[f"{at}feed_forward_moe.experts.mlp.{ours}"] = torch.cat([t.T if turned else t for t in each])
    return out


HELD = ("llama", "llama3", "llama_tied", "mistral", "qwen3", "mixtral", "qwen3_moe", "olmo", "olmo2", "olmo3", "olmoe",
        "flex_olmo")  # fmt: skip
SPARSE = ("mixtral", "qwen3_moe", "flex_olmo")


@pytest.mark.parametrize(("family", "experts"), [(f, "dropless") for f in HELD] + [(f, "default") for f in SPARSE])
def test_written_as_upstream_stores_it(family, experts, tiny_hf, tmp_path):
    source, out = tiny_hf(family), tmp_path / "out"
    options = {"experts": experts}
    if family == "flex_olmo":
        options["shard_size"] = "100kB"
    there = surgery.convert(source, out, to="olmo-core", options=options)
    weights = load_file(source / "model.safetensors")
    got = torchs_tensors(out / "model_and_optim", tmp_path)
    want = stored(weights, experts, family in ("olmo2", "olmo3", "flex_olmo"))
    assert got.keys() == want.keys()
    assert all(oracle.same_bits(got[k], want[k]) for k in want)
    if experts == "default":  # room for every token at every expert: none is dropped
        block = json.loads((out / "config.json").read_text())["model"]["block"]
        assert block["feed_forward_moe"]["capacity_factor"] == 3.0  # eight experts, three chosen
    if family == "flex_olmo":
        assert len(list((out / "model_and_optim").glob("*.distcp"))) > 5
    again = surgery.convert(out, tmp_path / "again", to="hf", options={"family": open_checkpoint(source).spec.family})
    assert again.content_digest == there.content_digest
    back = load_file(tmp_path / "again" / "model.safetensors")
    assert back.keys() == weights.keys()
    assert all(oracle.same_bits(back[k], weights[k]) for k in weights)


REFUSED_FAMILIES = {
    "qwen2": "bias",
    "gpt_neox": "parallel|feed_forward|hidden|activation",
    "gpt2": "positions|rotary|activation|feed",
    "qwen2_moe": "shared expert",
    "granitemoeshared": "shared expert",
    "glm4_moe": "shared expert",
    "ernie4_5_moe": "shared expert",
}


@pytest.mark.parametrize("family", REFUSED_FAMILIES)
def test_what_olmo_core_cannot_compute_is_refused(family, tiny_hf, tmp_path):
    with pytest.raises(ConfigError, match=rf"OLMo-core cannot hold this {family}: .*({REFUSED_FAMILIES[family]})"):
        surgery.convert(tiny_hf(family), tmp_path / "out", to="olmo-core")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------- names, files


def rewritten(name: str, folder: Path, rename) -> Path:
    """A golden whose tensors were saved by torch itself, under other names."""
    copy(name, folder)
    tensors = upstream_tensors(folder / "model_and_optim")
    shutil.rmtree(folder / "model_and_optim")
    writer = dcp.FileSystemWriter(folder / "model_and_optim")
    dcp.save({rename(k): t for k, t in tensors.items()}, storage_writer=writer, no_dist=True)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "rename",
    [
        lambda k: f"model.{k}",
        lambda k: k,
        lambda k: f"model._orig_mod.{k}",
        lambda k: "model." + k.replace("blocks.0.", "blocks.0._orig_mod."),
        lambda k: "model.module." + k,
        lambda k: "model." + k.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."),
        lambda k: "model._fsdp_wrapped_module." + k.replace("blocks.1.", "blocks.1._fsdp_wrapped_module."),
    ],
)
def test_names_of_wrapped_models(rename, tmp_path):
    folder = rewritten("olmo2", tmp_path / "x", rename)
    assert same(open_checkpoint(folder), open_checkpoint(golden("olmo2")))


def test_a_run_and_what_is_left_out(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for step in (2, 10):
        copy("olmo2", run / f"step{step}")
    (run / "step10" / "train").mkdir()
    (run / "step10" / ".metadata.json").write_text('{"version": "3.0.0", "ephemeral": false}')
    (run / "step11").mkdir()  # a save that was not completed
    checkpoint = open_checkpoint(run)
    assert checkpoint.details["step"] == 10
    assert checkpoint.details["OLMo-core version"] == "3.0.0"
    assert any("newest checkpoint step10" in note for note in checkpoint.notes)
    assert "the trainer's own state" in checkpoint.ignored["step10/train/"]
    assert "another checkpoint" in checkpoint.ignored["stepN/ (2 times)"]
    shutil.rmtree(run / "step2")
    shutil.rmtree(run / "step10")
    with pytest.raises(FileError, match="is no checkpoint of a known format"):
        open_checkpoint(run)


def test_the_optimizers_state_is_left_out(tmp_path):
    folder = tmp_path / "x"

    def rename(k: str) -> str:
        return k if k.startswith("optim.") else f"model.{k}"

    copy("olmo2", folder)
    tensors = upstream_tensors(folder / "model_and_optim")
    more = {f"optim.state.{k}.exp_avg": torch.zeros_like(t) for k, t in tensors.items()}
    shutil.rmtree(folder / "model_and_optim")
    dcp.save({rename(k): t for k, t in {**tensors, **more}.items()}, no_dist=True,
             storage_writer=dcp.FileSystemWriter(folder / "model_and_optim"))  # fmt: skip
    checkpoint = open_checkpoint(folder)
    assert same(checkpoint, open_checkpoint(golden("olmo2")))
    assert "the optimizer's state" in checkpoint.ignored["optim"]
    assert str(checkpoint.details["optimizer"]).startswith(f"{len(more)} tensors, ")


def test_missing_and_surplus(tmp_path):
    folder = copy("olmo2-fsdp", tmp_path / "x")
    (folder / "model_and_optim" / "__1_0.distcp").unlink()
    with pytest.raises(FileError, match=r"'__1_0.distcp' is missing"):
        open_checkpoint(folder)
    edited = rewritten("olmo2", tmp_path / "y", lambda k: "model." + k.replace("blocks.1.", "blocks.2."))
    with pytest.raises(LayoutError, match=r"blocks\.1\.{attention,feed_forward}_norm\.weight, .* are missing"):
        open_checkpoint(edited)


def test_recognised_by_its_files_alone(tmp_path):
    assert olmo_core.FORMAT.recognise(golden("olmo2"))
    shutil.copy(golden("olmo2") / "config.json", tmp_path)
    assert not olmo_core.FORMAT.recognise(tmp_path)


# ------------------------------------------------------------------------------------- the configuration, both ways


def changed(name: str, path: str, value: object) -> dict:
    """A golden's config with one value changed; `...` takes it away."""
    config = config_of(name)
    at = config
    *parents, last = path.split(".")
    for key in parents:
        at = at[key]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return config


_B, _A, _M = "model.block.", "model.block.sequence_mixer.", "model.block.feed_forward_moe."
REFUSED = [
    ("olmo2", "model", [], "has no section `model`"),
    ("olmo2", "model.name", "normalized", "model.name is 'normalized'"),
    ("olmo2", "model.embedding_norm", {"name": "rms"}, r"this is not supported: .*embedding_norm"),
    ("olmo2", "model.embed_scale", 4.9, "embed_scale is not 1"),
    ("olmo2", "model.block_overrides", {"2": {}}, "has the layer '2' of 2"),
    ("olmo2", "model.block_pattern", ["a"], "does not name blocks"),
    ("olmo2", "model.lm_head.bias", True, "a bias of the output head"),
    ("olmo2", "model.lm_head.layer_norm.eps", 1e-3, "not the same norm as the blocks'"),
    ("olmo2", _B + "name", "peri_norm", "name is 'peri_norm'"),
    ("olmo2", _B + "name", "moe_hybrid", "name is 'moe_hybrid'"),
    ("olmo2", _B + "attention_residual_alpha", 0.5, "attention_residual_alpha is not 1"),
    ("olmo2", _B + "layer_norm", ..., "layer_norm is missing"),
    ("olmo2", _B + "layer_norm.bias", True, "RMS norm without weights or with biases"),
    ("olmo2", _B + "feed_forward", ..., "feed_forward is missing"),
    ("olmo2", _B + "feed_forward.activation", "mish", "activation is 'mish'"),
    ("olmo2", _A + "type", "gated_delta_net", "is no attention but 'gated_delta_net'"),
    ("olmo2", _A + "name", "normalized", "name is 'normalized'"),
    ("olmo2", _A + "gate", {"granularity": "headwise"}, r"this is not supported: .*gate"),
    ("olmo2", _A + "scalable_softmax", True, r"this is not supported: .*scalable_softmax"),
    ("olmo2", _A + "attention_sinks", True, r"this is not supported: .*attention_sinks"),
    ("olmo2", _A + "softmax_scale", 0.5, r"this is not supported: .*softmax_scale"),
    ("olmo2", _A + "n_kv_heads", 3, "4 heads, 3 key/value heads"),
    ("olmo2", _A + "qk_norm.eps", 1e-3, "not the same kind of norm as layer_norm"),
    ("olmo2", _A + "rope", ..., "no rotary embeddings"),
    ("olmo2", _A + "rope.no_global_rope", True, "without rotary embeddings"),
    ("olmo2", _A + "rope.theta", "big", "theta is 'big'"),
    ("olmo2", _A + "rope.scaling", {"_CLASS_": "x.OtherConfig"}, "of the class 'OtherConfig'"),
    ("olmo2", _A + "sliding_window", {"pattern": [0]}, "not a list of window sizes"),
    ("flex-default", _M + "name", "emo", "name is 'emo'"),
    ("flex-default", _M + "shared_mlp", {"hidden_size": 4}, r"this is not supported: .*shared_mlp"),
    ("flex-default", _M + "router.normalize_expert_weights", 2.0, "normalize_expert_weights is 2: only 1"),
    ("flex-default", _M + "router.gating_function", "sigmoid", "gating_function is 'sigmoid'"),
    (
        "flex-default",
        _M + "router.uniform_expert_assignment",
        True,
        "this is not supported: .*uniform_expert_assignment",
    ),
    ("olmo2", "model.vocab_size", 0, "vocab_size is 0"),
]


@pytest.mark.parametrize(("name", "path", "value", "why"), REFUSED)
def test_what_cannot_be_said_is_refused(name, path, value, why):
    with pytest.raises(ConfigError, match=why):
        olmo_core_config.read_model(changed(name, path, value), "config.json")


def test_layers_that_differ_in_what_all_share():
    for change, why in (
        (("name", "default"), "layer 1 differs from layer 0 in norm_at"),
        (("sequence_mixer.rope.theta", 5), "layers of the same kind of attention have different ropes"),
        (("sequence_mixer.rope.name", "complex"), "layer 1 differs from layer 0 in rope layout"),
        (("feed_forward.hidden_size", 44), "feed forwards of the dense layers differ"),
    ):
        block = changed("olmo2", _B + change[0], change[1])["model"]["block"]
        with pytest.raises(ConfigError, match=why):
            olmo_core_config.read_model(changed("olmo2", "model.block_overrides", {"1": block}), "config.json")


def test_old_configs_say_attention():
    config = config_of("olmo2")
    attention = config["model"]["block"].pop("sequence_mixer")
    config["model"]["block"]["attention"] = {k: v for k, v in attention.items() if k != "type"}
    assert olmo_core_config.read_model(config, "x").spec == olmo_core_config.read_model(config_of("olmo2"), "x").spec


def test_named_blocks_in_a_pattern():
    config = config_of("olmo3-yarn")
    model = config["model"]
    plain, full = model["block"], model.pop("block_overrides")["1"]
    plain, full = (json.loads(json.dumps(b)) for b in (plain, full))
    for block, pattern in ((plain, [5]), (full, [-1])):
        block["sequence_mixer"]["sliding_window"]["pattern"] = pattern
        block["sequence_mixer"]["sliding_window"]["force_full_attention_on_last_layer"] = False
    model |= {"block": {"near": plain, "far": full}, "block_pattern": ["near", "far"]}
    want = olmo_core_config.read_model(config_of("olmo3-yarn"), "x").spec
    assert olmo_core_config.read_model(config, "x").spec == want
    assert want.windows == (5, 0, 5, 0)
    assert want.rope_local.scaling == {}


def test_windows_repeat_and_are_forced_open():
    window = {"pattern": [3, 4, -1]}
    spec = olmo_core_config.read_model(
        {**changed("olmo2", _A + "sliding_window", window), **{}}, "x"
    ).spec  # both ends are forced, as upstream does by default
    assert spec.windows == ()
    config = changed("olmo2", _A + "sliding_window", window)
    config["model"]["n_layers"] = 8
    assert olmo_core_config.read_model(config, "x").spec.windows == (0, 3, 4, 0, 3, 4, 0, 0)


def test_defaults_are_upstreams_and_named():
    config = changed("olmo2", _A + "rope", {"_CLASS_": "olmo_core.nn.rope.RoPEConfig"})
    del config["model"]["block"]["layer_norm"]["eps"]
    del config["model"]["block"]["sequence_mixer"]["qk_norm"]
    del config["model"]["lm_head"]["layer_norm"]["eps"]
    del config["dataset"]["sequence_length"]
    found = olmo_core_config.read_model(config, "config.json")
    assert (found.spec.rope.base, found.spec.norm_eps, found.spec.context) == (500000.0, 1e-5, 4096)
    said = " ".join(found.notes)
    for text in ("OLMo-core 3.0", "rope.theta = 500000", "layer_norm.eps = 1e-05", "-O max_positions=N"):
        assert text in said
    assert olmo_core_config.read_model(config, "x", 77).spec.context == 77


def test_unknown_keys_are_named():
    notes = olmo_core_config.read_model(changed("olmo2", _A + "warp", 9), "x").notes
    assert any("'model.block.sequence_mixer.warp' (9) is not understood" in note for note in notes)


def test_experts_that_drop_tokens_are_said_so():
    notes = open_checkpoint(golden("flex-default")).notes
    assert any("drop tokens over their capacity" in note for note in notes)


def test_the_ids_and_the_true_vocabulary_travel(tmp_path):
    surgery.convert(golden("olmo2"), tmp_path / "hf", to="hf")
    surgery.convert(tmp_path / "hf", tmp_path / "back", to="olmo-core")
    tokenizer = json.loads((tmp_path / "back" / "config.json").read_text())["dataset"]["tokenizer"]
    assert (tokenizer["eos_token_id"], tokenizer["pad_token_id"]) == (59, 1)


def test_experts_may_be_said_on_the_command_line(tmp_path):
    """A config whose `name` was edited: names and shapes are the same where both ways are equally wide."""
    config = changed("flex-default", _M + "name", "dropless")
    folder = copy("flex-default", tmp_path / "x")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LayoutError, match="w1"):
        open_checkpoint(folder)
    assert same(open_checkpoint(folder, options={"experts": "default"}), open_checkpoint(golden("flex-default")))
    with pytest.raises(UsageError, match="takes auto, default, dropless"):
        open_checkpoint(folder, options={"experts": "sparse"})


def test_numbers_that_olmo_core_cannot_say(tiny_hf, tmp_path):
    checkpoint = open_checkpoint(tiny_hf("llama"))
    rope = dataclasses.replace(checkpoint.spec.rope, base=10000.5)
    odd = dataclasses.replace(checkpoint, spec=checkpoint.spec.replace(rope=rope))
    with pytest.raises(ConfigError, match=r"a rope base of 10000.5: its theta is a whole number"):
        olmo_core.FORMAT.plan(odd, Topology(), {"experts": "auto", "shard_size": "5GB"})
    dynamic = dataclasses.replace(rope, base=1e4, scaling={"type": "dynamic", "factor": 2.0})
    odd = dataclasses.replace(checkpoint, spec=checkpoint.spec.replace(rope=dynamic))
    with pytest.raises(ConfigError, match="cannot hold the rope scaling"):
        olmo_core.FORMAT.plan(odd, Topology(), {"experts": "auto", "shard_size": "5GB"})

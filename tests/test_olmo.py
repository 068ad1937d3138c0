"""OLMo against checkpoints that its own code wrote, and against a naive account of what its code stores.

The goldens are what `tests/upstream/make_olmo_goldens.py` writes with ai2-olmo 0.6.0: every layout, from real runs.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import ConfigError, FileError, LayoutError, SurgeryError, UsageError
from surgery.formats.base import Checkpoint
from surgery.formats.olmo import config as olmo_config
from surgery.formats.olmo import files as olmo_files
from surgery.formats.olmo import table as olmo_table
from surgery.formats.olmo.names import decode_name
from surgery.formats.registry import open_checkpoint, recognise
from surgery.formats.table import Table
from surgery.formats.topology import Rank, Topology
from surgery.formats.weave import gather
from surgery.tensors.lazy import Fill
from tests import oracle, reference, tiny
from tests.test_hf import mutants

WHOLE = ("olmo2", "olmo1-groups", "llama-block", "learned-positions")
LAYOUTS = {
    "olmo2-safetensors": "unsharded safetensors",
    "olmo2-torch_new": "sharded: torch_new",
    "olmo2-torch_legacy": "sharded: torch_legacy",
    "olmo2-local": "sharded: local",
    "olmo2-olmo_core": "sharded: olmo_core",
}
IDS = torch.randint(0, 264, (2, 20), generator=torch.Generator().manual_seed(3))


def golden(name: str) -> Path:
    return oracle.GOLDEN / "olmo" / name / "checkpoint"


def copy(name: str, folder: Path) -> Path:
    shutil.copytree(golden(name), folder)
    return folder


def state_of(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, map_location="cpu", weights_only=True)


def tensors(name: str = "olmo2") -> dict[str, torch.Tensor]:
    return state_of(golden(name) / "model.pt")


def same(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether two checkpoints hold the same parts, bit for bit."""
    return a.parts.keys() == b.parts.keys() and all(
        oracle.same_bits(a.parts[n].full(), b.parts[n].full()) for n in a.parts
    )


def model_of(config: Path, **changes: object) -> dict:
    """The model section of a config.yaml; with `changes` (None takes a key away), the file is rewritten."""
    found = yaml.safe_load(config.read_text())
    if changes:
        found["model"] = {k: v for k, v in {**found["model"], **changes}.items() if v is not None}
        config.write_text(yaml.safe_dump(found))
    return found["model"]


# ------------------------------------------------------------------------------------- what the real program wrote


@pytest.mark.parametrize("name", [*WHOLE, *LAYOUTS])
def test_parts_compute_upstreams_logits(name):
    ids, want = oracle.expected(f"olmo/{name}")
    assert oracle.gap(reference.logits(open_checkpoint(golden(name)), ids), want) < 2e-5


@pytest.mark.parametrize("name", WHOLE[:3])
def test_there_and_back_gives_upstreams_file(name, tmp_path):
    """Through Hugging Face, which knows neither groups nor kinds of blocks: both come back."""
    there = surgery.convert(golden(name), tmp_path / "hf", to="hf")
    ids, want = oracle.expected(f"olmo/{name}")
    assert oracle.gap(oracle.hf_logits(tmp_path / "hf", ids), want) < 2e-5
    back = surgery.convert(tmp_path / "hf", tmp_path / "back", to="olmo")
    assert back.content_digest == there.content_digest
    ours, theirs = state_of(tmp_path / "back" / "model.pt"), tensors(name)
    assert ours.keys() == theirs.keys()
    assert all(oracle.same_bits(ours[k], theirs[k]) for k in theirs)
    config, want_config = model_of(tmp_path / "back" / "config.yaml"), model_of(golden(name) / "config.yaml")
    for key in ("d_model", "n_layers", "n_heads", "block_type", "block_group_size", "clip_qkv", "rope_theta",
                "mlp_hidden_size", "layer_norm_type", "layer_norm_with_affine", "attention_layer_norm", "norm_after",
                "layer_norm_eps", "embedding_size", "weight_tying", "eos_token_id", "pad_token_id",
                "max_sequence_length", "multi_query_attention"):  # fmt: skip
        assert config[key] == want_config[key], key


@pytest.mark.parametrize("name", ["learned-positions", "olmo2-local", "olmo2-torch_legacy"])
def test_olmo_to_olmo_keeps_everything(name, tmp_path):
    """A model that no other format holds is still rewritten; shards become one file, as upstream's unshard gives."""
    surgery.convert(golden(name), tmp_path / "out", to="olmo")
    ours = state_of(tmp_path / "out" / "model.pt")
    theirs = tensors("olmo2" if name in LAYOUTS else name)
    assert ours.keys() == theirs.keys()
    assert all(oracle.same_bits(ours[k], theirs[k]) for k in theirs)
    config, want = (yaml.safe_load((p / "config.yaml").read_text()) for p in (tmp_path / "out", golden(name)))
    assert {k: v for k, v in config.items() if k != "model"} == {k: v for k, v in want.items() if k != "model"}
    assert config["model"]["init_std"] == want["model"]["init_std"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_holds_the_same_model(name):
    checkpoint = open_checkpoint(golden(name))
    assert checkpoint.details["layout"] == LAYOUTS[name]
    assert same(checkpoint, open_checkpoint(golden("olmo2")))
    left_out = any("optim" in entry for entry in checkpoint.ignored)
    assert left_out == (name not in ("olmo2", "olmo2-groups"))
    part = checkpoint.parts["layers.1.mlp.gate"]
    assert oracle.same_bits(part[3:9, 5:11], part.full()[3:9, 5:11])  # a box across the ranks' pieces


def test_the_shape_of_a_sharded_run_does_not_matter_to_its_name(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for step, name in (("step10", "olmo2-torch_new"), ("step9-unsharded", "olmo2")):
        shutil.copytree(golden(name), run / step)
    checkpoint = open_checkpoint(run)
    assert checkpoint.details["step"] == 10
    assert any("newest checkpoint step10 is read" in note for note in checkpoint.notes)
    assert open_checkpoint(run / "step9-unsharded").details["step"] == 9
    assert recognise(run).name == "olmo"


# ------------------------------------------------------------------------------------- a naive account of upstream


def stored(w: dict[str, torch.Tensor], block: str, group: int, post: bool) -> dict[str, torch.Tensor]:
    """What OLMo's state dict holds: its modules' formulas, written out on Hugging Face's tensors."""
    out = {"transformer.wte.weight": w["model.embed_tokens.weight"]}
    if "lm_head.weight" in w:
        out["transformer.ff_out.weight"] = w["lm_head.weight"]
    if "model.norm.weight" in w:
        out["transformer.ln_f.weight"] = w["model.norm.weight"]
    layers = 1 + max(int(k.split(".")[2]) for k in w if k.startswith("model.layers."))
    after = ("post_attention_layernorm", "post_feedforward_layernorm")
    norms = after if post else ("input_layernorm", "post_attention_layernorm")
    for i in range(layers):
        home = f"blocks.{i}" if group == 1 else f"block_groups.{i // group}.{i % group}"
        at, src = f"transformer.{home}.", f"model.layers.{i}."
        for ours, theirs in zip(("attn_norm", "ff_norm"), norms, strict=True):
            if src + theirs + ".weight" in w:
                out[f"{at}{ours}.weight"] = w[f"{src}{theirs}.weight"]
        for x in "qk":
            if f"{src}self_attn.{x}_norm.weight" in w:
                out[f"{at}{x}_norm.weight"] = w[f"{src}self_attn.{x}_norm.weight"]
        q, k, v = (w[f"{src}self_attn.{x}_proj.weight"] for x in "qkv")
        if block == "llama":
            out |= {f"{at}{x}_proj.weight": t for x, t in zip("qkv", (q, k, v), strict=True)}
        else:
            out[at + "att_proj.weight"] = torch.cat([q, k, v])  # split(fused_dims) gives q, k, v
        out[at + "attn_out.weight"] = w[src + "self_attn.o_proj.weight"]
        if src + "mlp.gate.weight" not in w:
            # x, gate = ff_proj(x).chunk(2); silu(gate) * x
            out[at + "ff_proj.weight"] = torch.cat([w[src + "mlp.up_proj.weight"], w[src + "mlp.gate_proj.weight"]])
            out[at + "ff_out.weight"] = w[src + "mlp.down_proj.weight"]
            continue
        out[at + "ffn.router.layer.weight"] = w[src + "mlp.gate.weight"]
        each = [f"{src}mlp.experts.{e}." for e in range(w[src + "mlp.gate.weight"].shape[0])]
        for name, proj in (("w1", "gate"), ("v1", "up")):
            out[f"{at}ffn.experts.mlp.{name}"] = torch.cat([w[f"{e}{proj}_proj.weight"] for e in each])
        out[at + "ffn.experts.mlp.w2"] = torch.cat([w[f"{e}down_proj.weight"].T for e in each])
    return out


MODELS = {  # Hugging Face's family and changes, blocks, groups
    "olmo": ("olmo", {}, "auto", "auto"),
    "olmo_groups": ("olmo", {}, "sequential", "3"),
    "olmo_llama": ("olmo", {"g": 12, "n": 1}, "llama", "auto"),
    "olmo2": ("olmo2", {}, "auto", "2"),
    "olmo2_tied": ("olmo2", {"tie_word_embeddings": True}, "auto", "auto"),
    "olmoe": ("olmoe", {}, "auto", "auto"),
    "llama": ("llama", {}, "auto", "6"),
    "llama_mqa": ("llama", {"g": 1, "n": 12}, "llama", "2"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            family, changes, _, _ = MODELS[name]
            made[name] = tiny.save(family, tmp_path_factory.mktemp(name) / name, "float32", l=6, **changes)
        return made[name]

    return get


def account(name: str, folder: Path) -> dict[str, torch.Tensor]:
    family, _, block, group = MODELS[name]
    size = 1 if group == "auto" else int(group)
    return stored(load_file(folder / "model.safetensors"), block, size, family == "olmo2")


@pytest.mark.parametrize("name", MODELS)
def test_written_as_upstream_stores_it(name, models, tmp_path):
    source, (_, _, block, group) = models(name), MODELS[name]
    out = tmp_path / "out"
    there = surgery.convert(source, out, to="olmo", options={"block_type": block, "block_group_size": group})
    got, want = state_of(out / "model.pt"), account(name, source)
    assert got.keys() == want.keys()
    assert all(oracle.same_bits(got[k], want[k]) for k in want)
    again = surgery.convert(out, tmp_path / "again", to="hf")
    assert again.content_digest == there.content_digest
    back, weights = (load_file(p / "model.safetensors") for p in (tmp_path / "again", source))
    assert back.keys() == weights.keys()
    assert all(oracle.same_bits(back[k], weights[k]) for k in weights)
    ours, theirs = (json.loads((p / "config.json").read_text()) for p in (tmp_path / "again", source))
    for key in ("model_type", "num_key_value_heads", "intermediate_size", "clip_qkv", "num_experts_per_tok"):
        assert ours.get(key) == theirs.get(key)


@pytest.mark.parametrize("name", ["olmo", "olmo_llama", "olmo2", "olmoe", "llama"])
def test_a_mistake_in_any_row_shows(name, models, tmp_path):
    """The tensors are those of the naive account, the logits transformers'."""
    spec = open_checkpoint(models(name)).spec
    want = oracle.hf_logits(models(name), IDS)
    block = "moe" if spec.experts else {"auto": "sequential"}.get(MODELS[name][2], MODELS[name][2])
    rows = olmo_table.table(block).rows
    weights = stored(load_file(models(name) / "model.safetensors"), block, 1, name == "olmo2")
    save_file({k: t.contiguous() for k, t in weights.items()}, tmp_path / "x.safetensors")
    lazies = surgery.open_tensors(tmp_path / "x.safetensors")

    def gap(table) -> float:
        parts = gather(Table("olmo", tuple(table), olmo_table.IGNORED), {Rank(): lazies}, spec, Topology()).parts
        return oracle.gap(reference.logits(Checkpoint("olmo", Path(), spec, parts), IDS), want)

    assert gap(rows) < 2e-5
    tried = 0
    for row in rows:
        live = (row.when is None or row.when(spec, Topology())) and next(row.binds(spec), None) is not None
        if not live or row.optional:
            continue
        for mutant in mistakes(row):
            tried += 1
            try:
                assert gap(mutant if r is row else r for r in rows) > 1e-3, f"{row.name} as {mutant}"
            except (SurgeryError, ValueError):
                continue
    assert tried >= 7


def mistakes(row) -> list:
    found = mutants(row)
    if len(row.parts) == 3:
        q, k, v = row.parts
        found += [dataclasses.replace(row, parts=p) for p in ((q, v, k), (v, k, q))]
    if row.parts == ("layers.{l}.experts.{e}.down",):
        found.append(dataclasses.replace(row, layout=(("e", "h"), ("m",))))
    if row.parts[0].endswith(("q_norm", "mlp_post_norm", "mlp_norm")):
        other = row.parts[0].replace("q_norm", "k_norm").replace("mlp", "attn")
        found.append(dataclasses.replace(row, parts=(other,)))
    return found


def test_a_mistake_in_the_rows_of_old_models_shows():
    """Learned positions, plain feed forwards, norms with biases: no Hugging Face class has these together."""
    checkpoint = open_checkpoint(golden("learned-positions"))
    ids, want = oracle.expected("olmo/learned-positions")
    rows, table = olmo_table.table("sequential").rows, surgery.open_tensors(golden("learned-positions") / "model.pt")
    swaps = {"attn_norm": "mlp_norm", "attn_norm.bias": "mlp_norm.bias", "mlp_norm": "attn_norm", "positions": "embed",
             "mlp_norm.bias": "attn_norm.bias", "final_norm": "final_norm.bias"}  # fmt: skip
    tried = 0
    for row in rows:
        short = row.parts[0].removeprefix("layers.{l}.")
        if short not in swaps or next(row.binds(checkpoint.spec), None) is None:
            continue
        new = row.parts[0].removesuffix(short) + swaps[short]
        mutant = dataclasses.replace(row, parts=(new,))
        tried += 1
        try:
            parts = gather(Table("olmo", tuple(mutant if r is row else r for r in rows), olmo_table.IGNORED),
                           {Rank(): table}, checkpoint.spec, Topology()).parts  # fmt: skip
            assert oracle.gap(reference.logits(dataclasses.replace(checkpoint, parts=parts), ids), want) > 1e-3
        except (SurgeryError, ValueError):
            continue
    assert tried == 6


# ------------------------------------------------------------------------------------- names


PREFIXES = {
    "fsdp": lambda k: "_fsdp_wrapped_module." + k.replace("transformer.", "transformer._fsdp_wrapped_module."),
    "fsdp by block": lambda k: k.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."),
    "compiled": lambda k: "_orig_mod." + k,
    "compiled blocks": lambda k: k.replace("blocks.1.", "blocks.1._orig_mod."),
    "checkpointed": lambda k: k.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."),
    "ddp": lambda k: "module." + k,
    "compiled ddp": lambda k: "module._orig_mod." + k,
}


@pytest.mark.parametrize("kind", PREFIXES)
def test_names_of_wrapped_models(kind, tmp_path):
    folder = copy("olmo2", tmp_path / "x")
    renamed = {PREFIXES[kind](k): t for k, t in tensors().items()}
    assert renamed.keys() != tensors().keys()
    torch.save(renamed, folder / "model.pt")
    assert same(open_checkpoint(folder), open_checkpoint(golden("olmo2")))


def test_two_names_for_one_tensor_are_refused(tmp_path):
    folder = copy("olmo2", tmp_path / "x")
    state = tensors()
    torch.save({**state, "_orig_mod.transformer.ln_f.weight": state["transformer.ln_f.weight"]}, folder / "model.pt")
    with pytest.raises(LayoutError, match=r"both mean 'transformer.ln_f.weight'"):
        open_checkpoint(folder)


def test_one_norm_for_both(tmp_path):
    """The first releases had a single norm per block, which stands for the attention's and the mlp's."""
    folder, state = copy("olmo2", tmp_path / "x"), tensors()
    old = {k: t for k, t in state.items() if not k.endswith("ff_norm.weight")}
    old = {k.replace(".attn_norm.", ".norm."): t for k, t in old.items()}
    torch.save(old, folder / "model.pt")
    checkpoint = open_checkpoint(folder)
    for layer in range(2):
        want = state[f"transformer.blocks.{layer}.attn_norm.weight"]
        assert oracle.same_bits(checkpoint.parts[f"layers.{layer}.attn_post_norm"].full(), want)
        assert oracle.same_bits(checkpoint.parts[f"layers.{layer}.mlp_post_norm"].full(), want)


def test_groups_of_another_size_than_the_config_says(tmp_path):
    folder = copy("olmo1-groups", tmp_path / "x")
    model_of(folder / "config.yaml", block_group_size=4)
    assert same(open_checkpoint(folder), open_checkpoint(golden("olmo1-groups")))


def encoded(keys: object, pickled: bool = False, protocol: int = 4) -> str:
    return base64.urlsafe_b64encode(pickle.dumps((keys, pickled), protocol)).decode()


def test_encoded_names():
    assert decode_name(encoded(("a.b", 3, "c")), "f") == (("a.b", 3, "c"), False)
    assert decode_name(encoded(("x",), True), "f") == (("x",), True)
    for name, why in (
        ("transformer.wte", "not base64"),
        ("gASV", "pickle|truncated|ends"),
        (encoded("abc"), "not to a tuple of keys"),
        (encoded(()), "not to a tuple of keys"),
        (encoded((1.5,)), "not to a tuple of keys"),
        (base64.urlsafe_b64encode(pickle.dumps((("a",), 1), 4)).decode(), r"does not decode to \(keys, pickled\)"),
        (base64.urlsafe_b64encode(pickle.dumps((("a",), False), 4) + b"tail").decode(), "does not decode"),
        ("A" * 70000, "not base64"),
    ):
        with pytest.raises(SurgeryError, match=why):
            decode_name(name, "f")


class Boom:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_an_encoded_name_is_never_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = copy("olmo2-safetensors", tmp_path / "x")
    save_file({encoded((Boom(),)): torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(SurgeryError):
        open_checkpoint(folder)
    assert not (tmp_path / "executed").exists()


def test_encoded_values_are_no_weights(tmp_path):
    folder = copy("olmo2-safetensors", tmp_path / "x")
    state = load_file(folder / "model.safetensors")
    save_file({**state, encoded(("extra",), True): torch.zeros(3, dtype=torch.uint8)}, folder / "model.safetensors")
    with pytest.raises(FileError, match="'extra', which are no tensors"):
        open_checkpoint(folder)


def test_plain_names_in_safetensors(tmp_path):
    folder = copy("olmo2-safetensors", tmp_path / "x")
    save_file(tensors(), folder / "model.safetensors")
    assert same(open_checkpoint(folder), open_checkpoint(golden("olmo2")))


# ------------------------------------------------------------------------------------- broken shards


BROKEN = [
    ("olmo2-local", "model/rank1.pt", "says world_size 2, but model/ holds 1 ranks"),
    ("olmo2-local", "model/rank0.pt", "is no checkpoint of a known format"),
    ("olmo2-torch_legacy", "rank1.pt", "hold 768 elements, its shape .* has 1536"),
    ("olmo2-torch_new", "model_and_optim/__1_0.distcp", "__1_0.distcp' is missing"),
    ("olmo2-olmo_core", "model/rank_1.safetensors", "rank_1.safetensors"),
    ("olmo2", "config.yaml", "is no checkpoint of a known format"),
]


@pytest.mark.parametrize(("name", "gone", "why"), BROKEN)
def test_missing_files_are_named(name, gone, why, tmp_path):
    folder = copy(name, tmp_path / "x")
    (folder / gone).unlink()
    with pytest.raises(SurgeryError, match=why):
        surgery.convert(folder, tmp_path / "out", to="olmo")
    assert not (tmp_path / "out").exists()


def test_flat_files_that_do_not_cover_a_tensor(tmp_path):
    folder = copy("olmo2-olmo_core", tmp_path / "x")
    path = folder / "model" / "metadata.json"
    metadata = json.loads(path.read_text())
    name = next(iter(metadata["tensors"]))
    specs = metadata["tensors"][name]["shard_spec_per_file"]
    file = next(f for f, s in specs.items() if any(b > a for a, b in s["flattened_offsets"]))
    spans = specs[file]["flattened_offsets"]
    spans[-1][1] -= 1
    path.write_text(json.dumps(metadata))
    with pytest.raises(FileError, match="has elements that metadata\\.json does not place"):
        open_checkpoint(folder)
    spans[-1] = [spans[-1][0] + 1, spans[-1][1] + 2]
    path.write_text(json.dumps(metadata))
    with pytest.raises(SurgeryError):
        surgery.convert(folder, tmp_path / "out", to="olmo")
    specs["../../elsewhere.safetensors"] = specs.pop(file)
    path.write_text(json.dumps(metadata))
    with pytest.raises(FileError, match="not a plain file name"):
        open_checkpoint(folder)


def test_ranks_of_two_saves_are_told_apart(tmp_path):
    folder = copy("olmo2-local", tmp_path / "x")
    shutil.copy(folder / "model" / "rank0.pt", folder / "model" / "rank1.pt")
    with pytest.raises(SurgeryError, match="hold 12 elements, its shape"):
        surgery.convert(folder, tmp_path / "out", to="olmo")


def test_older_torch_describes_flat_parameters_otherwise(tmp_path):
    """Up to torch 2.0: `_shard_indices` and `_shard_param_offsets` instead of a record for each parameter."""
    folder = copy("olmo2-local", tmp_path / "x")
    for path in (folder / "model").glob("rank*.pt"):
        state = torch.load(path, weights_only=False)
        for module in state["modules"]:
            for handle in module["handles"]:
                infos = handle.pop("flat_param._shard_param_infos")
                held_here = [(i, info) for i, info in enumerate(infos) if info.in_shard]
                handle["flat_param._shard_indices"] = (held_here[0][0], held_here[-1][0])
                handle["flat_param._shard_param_offsets"] = tuple(
                    (info.intra_param_start_idx, info.intra_param_end_idx) for _, info in held_here
                )
        torch.save(state, path)
    assert same(open_checkpoint(folder), open_checkpoint(golden("olmo2")))


# ------------------------------------------------------------------------------------- the configuration, both ways

BASE = {"rope": True, "include_bias": False, "layer_norm_type": "rms", "bias_for_layer_norm": False}


def test_defaults_are_upstreams_and_named():
    found = olmo_config.read_model({"model": dict(BASE)}, "config.yaml")
    spec = found.spec
    assert (spec.layers, spec.width, spec.heads, spec.kv_heads, spec.ffn, spec.vocab, spec.true_vocab, spec.tied,
        spec.context) == (
        12, 768, 12, 12, 1536, 50304, 50257, True, 1024)  # fmt: skip
    note = next(n for n in found.notes if "ai2-olmo 0.6.0" in n)
    for text in ("model.d_model = 768", "model.rope_theta = 10000", "model.layer_norm_eps = 1e-05"):
        assert text in note
    assert "model.rope =" not in note
    stated = olmo_config.read_model({"model": {**BASE, "embedding_size": None}}, "config.yaml").spec
    assert stated.vocab == 50257


def test_ids_that_early_configs_have_wrong(tmp_path):
    folder = copy("olmo2", tmp_path / "x")
    model_of(folder / "config.yaml", eos_token_id=0)
    assert any("-O eos_token_id=50279" in note for note in open_checkpoint(folder).notes)
    fixed = open_checkpoint(folder, options={"eos_token_id": "59"})
    assert fixed.facts["eos_token_id"] == 59
    assert not any("by mistake" in note for note in fixed.notes)


REFUSED = {
    "alibi": (True, "alibi: true"),
    "include_bias": (True, "include_bias: true"),
    "scale_logits": (True, "scale_logits: true"),
    "embedding_layer_norm": (True, "embedding_layer_norm: true"),
    "attention_layer_norm": ("yes", "attention_layer_norm is 'yes', not true or false"),
    "layer_norm_type": ("batch", "layer_norm_type is 'batch'"),
    "bias_for_layer_norm": (True, "rms without weights or with biases"),
    "layer_norm_with_affine": (False, "rms without weights or with biases"),
    "block_type": ("parallel", "block_type is 'parallel', not one of sequential, llama, moe"),
    "activation_type": ("mish", "activation_type is 'mish'"),
    "n_heads": (7, "768, 7 heads and 7 key/value heads do not fit"),
    "n_kv_heads": (5, "12 heads and 5 key/value heads do not fit"),
    "embedding_size": (5000, "embedding_size 5000 is less than vocab_size 50257"),
    "mlp_hidden_size": (77, "an mlp of width 77 cannot be halved"),
    "n_layers": (True, "n_layers is True, not a whole number"),
    "rope_theta": (0, "rope_theta is 0, not a positive number"),
    "d_model": (1 << 40, "d_model is"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_cannot_be_said_is_refused(key):
    value, why = REFUSED[key]
    with pytest.raises(ConfigError, match=why):
        olmo_config.read_model({"model": {**BASE, key: value}}, "config.yaml")


def test_contradictions_are_refused():
    for more, why in (
        ({"n_kv_heads": 4, "multi_query_attention": True}, "n_kv_heads 4 contradicts multi_query_attention"),
        ({"n_kv_heads": 4, "block_type": "llama"}, r"blocks of type llama do not know n_kv_heads \(4\)"),
        ({"block_type": "moe", "moe_top_k": 9}, "moe_top_k 9 of 8 experts"),
        ({"block_type": "moe", "moe_dropless": False}, "tokens over an expert's capacity are dropped"),
        ({"block_type": "moe", "norm_after": True}, "norm_after: true"),
        ({"block_type": "moe", "moe_shared_expert": True}, "moe_shared_expert: true"),
        ({"attention_layer_norm": True, "attention_layer_norm_with_affine": False}, "not rms with weights"),
    ):
        with pytest.raises(ConfigError, match=why):
            olmo_config.read_model({"model": {**BASE, **more}}, "config.yaml")
    with pytest.raises(ConfigError, match="has no section `model`"):
        olmo_config.read_model({"d_model": 4}, "config.yaml")


def test_unknown_keys_are_named_and_inert_ones_are_not():
    found = olmo_config.read_model({"model": {**BASE, "warp_drive": 9, "init_std": 0.1}}, "config.yaml")
    assert any("'model.warp_drive' (9) is not understood" in note for note in found.notes)
    assert not any("init_std" in note for note in found.notes)


def test_norms_with_weights_have_no_place_in_hugging_face(tmp_path):
    """OLMo 1 with affine LayerNorm: upstream's own converter drops the norms without a word."""
    with pytest.raises(ConfigError, match=r"no Hugging Face family holds this model; .*learned positions: 32"):
        surgery.convert(golden("learned-positions"), tmp_path / "out", to="hf")
    folder = copy("olmo1-groups", tmp_path / "x")
    model_of(folder / "config.yaml", layer_norm_with_affine=True)
    state = tensors("olmo1-groups")
    for i in range(4):
        for norm in ("attn_norm", "ff_norm"):
            state[f"transformer.block_groups.{i // 2}.{i % 2}.{norm}.weight"] = torch.ones(24)
    state["transformer.ln_f.weight"] = torch.ones(24)
    torch.save(state, folder / "model.pt")
    with pytest.raises(ConfigError, match="olmo comes nearest, but: norm: LayerNorm without biases"):
        surgery.convert(folder, tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()


def test_clipping_with_query_norms_is_another_function_elsewhere(tmp_path):
    """OLMo clips q, k and v before their norms, Hugging Face's OLMoE behind them."""
    folder = copy("olmo2", tmp_path / "x")
    model_of(folder / "config.yaml", clip_qkv=1.5)
    with pytest.raises(ConfigError, match=r"clip of q, k and v: 1\.5"):
        surgery.convert(folder, tmp_path / "out", to="hf")
    surgery.convert(folder, tmp_path / "same", to="olmo")
    assert model_of(tmp_path / "same" / "config.yaml")["clip_qkv"] == 1.5


HELD = {"llama", "olmo", "olmo2", "olmoe"}


@pytest.mark.parametrize("family", [f for f in tiny.FAMILIES if f not in HELD])
def test_what_olmo_cannot_compute_is_refused(family, tiny_hf, tmp_path):
    with pytest.raises(ConfigError, match="OLMo cannot hold"):
        surgery.convert(tiny_hf(family), tmp_path / "out", to="olmo")
    assert not list(tmp_path.iterdir())


def test_options_that_do_not_fit(tiny_hf, tmp_path):
    with pytest.raises(ConfigError, match="6 layers are no multiple of a block_group_size of 4"):
        surgery.convert(tiny_hf("olmo2"), tmp_path / "out", to="olmo", options={"block_group_size": "4"})
    with pytest.raises(ConfigError, match="OLMo cannot hold"):  # norms behind, and four heads of keys
        surgery.convert(tiny_hf("olmo2"), tmp_path / "out", to="olmo", options={"block_type": "llama"})
    with pytest.raises(UsageError, match="olmo checkpoints have no --tp 2"):
        surgery.convert(tiny_hf("olmo2"), tmp_path / "out", to="olmo", topology=Topology(tp=2))
    with pytest.raises(UsageError, match="takes auto, sequential, llama"):
        surgery.convert(tiny_hf("olmo2"), tmp_path / "out", to="olmo", options={"block_type": "moe"})


def test_regrouping():
    names = [f"transformer.blocks.{i}.attn_out.weight" for i in range(6)]
    there = {olmo_files.grouped(n, 3): Fill((1,), "float32") for n in names}
    assert list(there)[4] == "transformer.block_groups.1.1.attn_out.weight"
    assert list(olmo_files.ungrouped(there)) == names

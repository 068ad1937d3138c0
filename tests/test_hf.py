"""Hugging Face: every family's table and config against transformers' own logits, through a plain reference model."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch

import surgery
from surgery.containers import open_tensors
from surgery.errors import ConfigError, LayoutError, SurgeryError
from surgery.formats.base import Checkpoint
from surgery.formats.hf import rows as hf_rows
from surgery.formats.hf import table as hf
from surgery.formats.hf.config import FAMILIES, choose_family, misfits, read_config, write_config
from surgery.formats.names import collapsed
from surgery.formats.registry import open_checkpoint
from surgery.formats.table import Row, Table
from surgery.formats.topology import Rank, Topology
from surgery.formats.weave import gather
from surgery.model.spec import Rope, Spec
from tests import oracle, reference, tiny

IDS = torch.randint(0, 264, (2, 20), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def truth(tiny_hf):
    made = {}

    def get(family):
        if family not in made:
            made[family] = oracle.hf_logits(tiny_hf(family), IDS)
        return made[family]

    return get


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_parts_and_config_compute_what_transformers_computes(family, tiny_hf, truth):
    checkpoint = open_checkpoint(tiny_hf(family))
    assert oracle.gap(reference.logits(checkpoint, IDS), truth(family)) < 2e-5
    assert choose_family(checkpoint.spec) == checkpoint.spec.family


def mutants(row: Row) -> list[Row]:
    """The same row with a plausible mistake: parts in another order, axes in another order, another part."""
    found = []
    if len(row.parts) > 1:
        found.append(dataclasses.replace(row, parts=(row.parts[1], row.parts[0], *row.parts[2:])))
    for i, group in enumerate(row.layout):
        if len(group) > 1:
            turned = (*group[1:], group[0])
            found.append(dataclasses.replace(row, layout=(*row.layout[:i], turned, *row.layout[i + 1 :])))
    swaps = {"attn.k": "attn.v", "mlp.gate": "mlp.up", "attn_norm": "mlp_norm", "q_norm": "k_norm", ".gate": ".up",
             "q_head_norm": "k_head_norm", "embed": "lm_head", "attn_post_norm": "mlp_post_norm"}  # fmt: skip
    for old, new in swaps.items():
        if len(row.parts) == 1 and row.parts[0].endswith(old):
            found.append(dataclasses.replace(row, parts=(row.parts[0].removesuffix(old) + new,)))
    return found


def applicable(family: str, spec) -> list[Row]:
    rows = hf.table(family).rows
    return [r for r in rows if not r.optional and next(r.binds(spec), None) is not None]


@pytest.mark.parametrize("family", [f for f in tiny.FAMILIES if f not in ("llama3", "mistral")])
def test_a_mistake_in_any_row_shows(family, tiny_hf, truth):
    checkpoint = open_checkpoint(tiny_hf(family))
    spec = checkpoint.spec
    tensors = open_tensors(tiny_hf(family))
    tables = hf.table(spec.family)
    tried = 0
    for row in applicable(spec.family, spec):
        for mutant in mutants(row):
            tried += 1
            rows = tuple(mutant if r is row else r for r in tables.rows)
            try:
                parts = gather(Table("hf", rows, hf_rows.IGNORED), {Rank(): tensors}, spec, Topology()).parts
            except SurgeryError:
                continue
            wrong = Checkpoint("hf", checkpoint.path, spec, parts)
            assert oracle.gap(reference.logits(wrong, IDS), truth(family)) > 1e-3, f"{row.name} as {mutant}"
    assert tried >= 5


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_field_of_the_config_counts(family, tiny_hf, truth):
    """A reader that ignored one of these keys would compute other logits: so the reference must react to them."""
    config = json.loads((tiny_hf(family) / "config.json").read_text())
    changes = {"rms_norm_eps": 0.3, "layer_norm_eps": 0.3, "clip_qkv": 0.1, "num_experts_per_tok": 1}
    base = open_checkpoint(tiny_hf(family))
    for key, value in changes.items():
        if config.get(key) is not None:
            spec, _, _ = read_config({**config, key: value}, "config.json")
            assert oracle.gap(reference.logits(dataclasses.replace(base, spec=spec), IDS), truth(family)) > 1e-3, key


@pytest.mark.parametrize("model_type", FAMILIES)
def test_written_config_reads_the_same_and_transformers_accepts_it(model_type, tiny_hf):
    from transformers import AutoConfig

    from surgery.running.loading import own_classes

    family = {"llama": "llama3"}.get(model_type, model_type)
    relatives = {
        "flex_olmo": ("olmo2", {"experts": 8, "expert_ffn": 56, "ffn": 0, "top_k": 3}),
        "attention_moe": (
            "llama3",
            {"attn_experts": 2, "attn_top_k": 1, "attn_scale": 2**0.5, "top_k_renormalised": True},
        ),
    }
    family, changes = relatives.get(model_type, (family, {}))
    spec = open_checkpoint(tiny_hf(family)).spec.replace(family=model_type, **changes)
    config = write_config(spec, {}, "float32", model_type)
    assert not misfits(spec, model_type)
    own = own_classes(model_type)
    theirs = own.config(**config) if own else AutoConfig.for_model(**config)
    again, _, notes = read_config(json.loads(theirs.to_json_string()), "config.json")
    assert not {k: v for k, v in spec.differences(again).items() if k not in ("true_vocab",)}
    assert not [n for n in notes if "not understood" in n]


def test_a_model_that_no_family_holds_is_refused(tiny_hf):
    spec = open_checkpoint(tiny_hf("olmo2")).spec.replace(clip_qkv=3.0)
    with pytest.raises(ConfigError, match=r"clip of q, k and v: 3"):
        choose_family(spec)


def test_unknown_families_and_quantised_weights_are_refused(tiny_hf):
    config = json.loads((tiny_hf("llama") / "config.json").read_text())
    with pytest.raises(ConfigError, match="model_type is 'made_up'"):
        read_config({**config, "model_type": "made_up"}, "config.json")
    with pytest.raises(ConfigError, match="quantised"):
        read_config({**config, "quantization_config": {"bits": 4}}, "config.json")


@pytest.mark.parametrize("bad", [{"hidden_size": -4}, {"num_attention_heads": 7}, {"vocab_size": "many"},
                                 {"rms_norm_eps": 0}, {"num_hidden_layers": 1 << 40}, {"hidden_act": "magic"},
                                 {"rope_parameters": 3}, {"num_key_value_heads": 0}])  # fmt: skip
def test_senseless_values_are_refused(bad, tiny_hf):
    config = json.loads((tiny_hf("llama") / "config.json").read_text())
    with pytest.raises(ConfigError):
        read_config({**config, **bad}, "config.json")


def test_an_odd_key_is_named(tiny_hf):
    config = json.loads((tiny_hf("llama") / "config.json").read_text())
    _, _, notes = read_config({**config, "secret_sauce": 1}, "config.json")
    assert any("secret_sauce" in n for n in notes)


def test_missing_and_surplus_tensors_are_named(tiny_hf):
    spec = open_checkpoint(tiny_hf("llama")).spec
    tensors = dict(open_tensors(tiny_hf("llama")))
    odd = tensors.pop("model.layers.2.mlp.up_proj.weight")
    tensors["model.layers.2.mlp.up_proj.weigth"] = odd
    with pytest.raises(LayoutError) as error:
        gather(hf.table("llama"), {Rank(): tensors}, spec, Topology())
    assert "model.layers.2.mlp.up_proj.weight is missing" in str(error.value)
    assert "up_proj.weigth" in str(error.value)


def test_the_original_length_beside_the_scaling_counts(tiny_hf):
    """As Phi-3 has it; transformers gives it the priority."""
    config = json.loads((tiny_hf("llama3") / "config.json").read_text())
    inside = config["rope_parameters"]["original_max_position_embeddings"]
    with pytest.raises(ConfigError, match="original_max_position_embeddings is 4096, but 8192 in the rope's own"):
        read_config({**config, "original_max_position_embeddings": 4096}, "config.json")  # transformers 4 takes 8192
    del config["rope_parameters"]["original_max_position_embeddings"]
    spec, _, notes = read_config({**config, "original_max_position_embeddings": 4096}, "config.json")
    assert (inside, spec.rope.scaling["original_max_position_embeddings"]) == (8192, 4096)
    assert not any("not understood" in note for note in notes)
    assert read_config(config, "x")[0].rope.scaling["original_max_position_embeddings"] == 16384  # the longest context
    assert torch.equal(frequencies({**config, "original_max_position_embeddings": 4096}), frequencies(config, 4096))
    assert not torch.equal(frequencies(config), frequencies(config, 4096))


def frequencies(config: dict, inside: int | None = None) -> torch.Tensor:
    """What transformers computes of a config; `inside`: with this original length inside the rope's parameters."""
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    more = {} if inside is None else {"original_max_position_embeddings": inside}
    values = {**config, "rope_parameters": {**config["rope_parameters"], **more}}
    return LlamaRotaryEmbedding(AutoConfig.for_model(**values)).inv_freq


def test_missing_tensors_of_all_layers_are_one_line(tiny_hf):
    """Phi-3's fused names in a llama: what is missing and what is left over, once each."""
    spec = open_checkpoint(tiny_hf("llama")).spec
    tensors = dict(open_tensors(tiny_hf("llama")))
    for layer in range(spec.layers):
        at = f"model.layers.{layer}.self_attn."
        tensors[at + "qkv_proj.weight"], *_ = [tensors.pop(f"{at}{x}_proj.weight") for x in "qkv"]
    with pytest.raises(LayoutError) as error:
        gather(hf.table("llama"), {Rank(): tensors}, spec, Topology())
    assert str(error.value) == (
        "model.layers.N.self_attn.{k,q,v}_proj.weight (6 of each) are missing\n"
        "  6 tensors have no place in a hf llama: model.layers.N.self_attn.qkv_proj.weight (6)"
    )


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a.0.b", "lm_head.weight"], ["a.0.b", "lm_head.weight"]),
        (["a.0.b", "a.1.b", "a.2.b"], ["a.N.b (3)"]),
        (["x.gate.w", "x.up.w", "x.down.b"], ["x.{gate,up}.w", "x.down.b"]),
        (["x.gate", "x.gateway"], ["x.gate{,way}"]),
        ([f"{i}.{i}x" for i in range(300)], ["0.0x", "1.1x"]),
    ],
)
def test_names_in_few_words(names, said):
    assert collapsed(names)[: len(said)] == said


def test_fused_experts_are_read(tiny_hf, tmp_path):
    """transformers 5 holds experts fused in memory; some tools save them so."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "fused"
    folder.mkdir()
    stored = load_file(tiny_hf("qwen3_moe") / "model.safetensors")
    experts = tiny.SIZES["e"]
    for layer in range(1, tiny.SIZES["l"]):
        at = f"model.layers.{layer}.mlp.experts."
        take = {k: [stored.pop(f"{at}{e}.{k}_proj.weight") for e in range(experts)] for k in ("gate", "up", "down")}
        pairs = zip(take["gate"], take["up"], strict=True)
        stored[f"{at}gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        stored[f"{at}down_proj"] = torch.stack(take["down"])
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((tiny_hf("qwen3_moe") / "config.json").read_bytes())
    one, other = open_checkpoint(tiny_hf("qwen3_moe")), open_checkpoint(folder)
    assert one.parts.keys() == other.parts.keys()
    assert all(oracle.same_bits(one.parts[n].full(), other.parts[n].full()) for n in one.parts)


def test_a_longest_context_that_is_not_known(tmp_path, tiny_hf):
    """OLMo-core exports max_position_embeddings: -1."""
    shutil.copytree(tiny_hf("olmo2"), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": -1}))
    found = open_checkpoint(tmp_path / "m")
    assert found.spec.context is None
    assert any("-1 for the longest context" in note for note in found.notes)
    assert choose_family(found.spec) == "olmo2"
    assert "max_position_embeddings" not in write_config(found.spec, {}, "float32", "olmo2")


# ------------------------------------------------------------------------------------ what other versions read


def classic(config: dict) -> tuple[float, dict]:
    """(base, scaling) that transformers 4 takes from a config: it does not know `rope_parameters`."""
    keys = ("rotary_emb_base",) if config["model_type"] == "gpt_neox" else ("rope_theta",)
    scaling = dict(config.get("rope_scaling") or {})
    return config.get(keys[0], 10000.0), {k: v for k, v in scaling.items() if k != "rope_theta" and v is not None}


@pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if name != "gpt2"])
def test_transformers_4_reads_the_same_rope(family, tiny_hf, tmp_path):
    """From Hugging Face to itself, and from other formats."""
    rope = open_checkpoint(tiny_hf(family)).spec.rope
    local = open_checkpoint(tiny_hf(family)).spec.rope_local
    surgery.convert(tiny_hf(family), tmp_path / "out", to="hf", sync=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    base, scaling = classic(config)
    if local and local.base != rope.base:  # two bases cannot be said
        assert "rope_theta" not in config
        return
    assert base == rope.base
    assert (scaling.get("rope_type", "default"), scaling.get("factor")) == (
        rope.scaling.get("type", "default"),
        rope.scaling.get("factor"),
    )
    fresh = write_config(open_checkpoint(tiny_hf(family)).spec, {}, "float32", config["model_type"])
    assert classic(fresh) == (base, scaling)


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "flex_olmo"])
def test_transformers_4_reads_the_same_number_of_experts(family, tiny_hf, tmp_path):
    """transformers 5 renamed it in some families, and saves the new name alone."""
    shutil.copytree(tiny_hf(family), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["num_local_experts"] = config.pop("num_experts", None) or config["num_local_experts"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    surgery.convert(tmp_path / "m", tmp_path / "out", to="hf", sync=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_experts"] == config["num_local_experts"] == tiny.SIZES["e"]


def test_transformers_4_looks_for_longropes_length_outside(tmp_path):
    factors = {"short_factor": [1.0, 1.1, 1.3, 1.6, 2.0], "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0]}
    rope = {
        "rope_type": "longrope",
        "rope_theta": 2e4,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        **factors,
    }
    source = tiny.save("llama", tmp_path / "m", rope_parameters=rope, max_position_embeddings=64)
    surgery.convert(source, tmp_path / "out", to="hf", sync=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["original_max_position_embeddings"] == 16
    fresh = write_config(open_checkpoint(source).spec, {}, "float32", "llama")
    assert fresh["original_max_position_embeddings"] == 16
    assert read_config(fresh, "x")[0].same_function(open_checkpoint(source).spec)


def test_olmo_3_says_its_scaling_in_both_spellings():
    rope = Rope(5e5, 1.0, {"type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
                           "original_max_position_embeddings": 8192})  # fmt: skip
    spec = Spec("olmo3", layers=2, width=24, vocab=40, kv_heads=2, group=3, head_dim=4, ffn=20, context=65536,
                norm_at="post", qk_norm="full", windows=(7, 0), rope=rope, rope_local=Rope(5e5))  # fmt: skip
    config = write_config(spec, {}, "float32", "olmo3")
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"]["rope_type"] == "yarn"
    assert config["rope_parameters"]["sliding_attention"] == {"rope_type": "default", "rope_theta": 5e5}
    assert read_config(config, "x")[0].same_function(spec)
    other = write_config(spec.replace(rope_local=Rope(1e4)), {}, "float32", "olmo3")
    assert "rope_theta" not in other

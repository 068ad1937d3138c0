"""What is not understood stops a conversion, unless it is allowed by name: keys of configs, dtypes of weights."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import surgery
from surgery.cli import main as cli
from surgery.errors import ConfigError
from surgery.formats.hf.config import choose_family, read_config
from surgery.formats.megatron.config import read_args, write_args
from surgery.formats.megatron.inert import is_inert
from surgery.formats.registry import open_checkpoint
from surgery.formats.unknown import Unknown, settle
from surgery.model.spec import Rope
from tests import oracle


def run(*words):
    return CliRunner().invoke(cli.main, [str(w) for w in words])


def json_file(folder, name, **changes):
    """The JSON file of a copied checkpoint, changed."""
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def hf(source, folder, **changes):
    shutil.copytree(source, folder)
    return json_file(folder, "config.json", **changes)


def meta(folder, **changes):
    shutil.copytree(oracle.GOLDEN / "meta" / "llama2-gqa-mp2" / "checkpoint", folder)
    return json_file(folder, "params.json", **changes)


def olmo(folder, **changes):
    shutil.copytree(oracle.GOLDEN / "olmo" / "olmo2" / "checkpoint", folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"] |= changes
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def olmo_core(folder, **changes):
    shutil.copytree(oracle.GOLDEN / "olmo_core" / "olmo2" / "checkpoint", folder)
    config = json.loads((folder / "config.json").read_text())
    config["model"]["block"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("key", "value"),
    [("is_causal", False), ("softcap", 30.0), ("attn_temperature_tuning", True), ("no_rope_layers", [1, 0])],
)
def test_a_key_of_hugging_face_is_refused_until_it_is_allowed(tiny_hf, tmp_path, key, value):
    source, out = hf(tiny_hf("llama"), tmp_path / "source", **{key: value}), tmp_path / "out"
    done = run("convert", source, out, "--to", "meta")
    assert done.exit_code == 1
    assert key in done.output
    assert f"--allow-unknown {key}" in done.output
    assert not out.exists()
    done = run("convert", source, out, "--to", "meta", "--allow-unknown", key)
    assert done.exit_code == 0, done.output
    assert f"'{key}'" in done.output.replace("\n", "")  # it is named all the same


@pytest.mark.parametrize(
    ("make", "key", "value"),
    [
        (meta, "attention_chunk_size", 8192),  # Llama 4
        (meta, "nope_layer_interval", 4),
        (meta, "use_qk_norm", True),
        (meta, "attn_temperature_tuning", True),
        (olmo, "softcap", 30.0),
        (olmo_core, "sinks", True),
        (olmo_core, "residual_scale", 0.5),
    ],
)
def test_every_format_refuses(make, key, value, tmp_path):
    source = make(tmp_path / "source", **{key: value})
    with pytest.raises(ConfigError, match=key):
        surgery.convert(source, tmp_path / "out", to="hf")
    allowed = open_checkpoint(source, options={"allow_unknown": f"something,{key}"})
    assert any(isinstance(note, Unknown) and key in note for note in allowed.notes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),  # ms-swift, which patches inv_freq
        ("partial_rotary_factor", 0.5),
        ("original_max_position_embeddings", 4096),
        ("layer_types", ["full_attention"]),
        ("softmax_scale", 0.5),
        ("logit_softcap", 30.0),
        ("log_softcap", 30.0),
        ("min_attention_window", 7),
        ("main_rope_base", 5e5),
    ],
)
def test_megatrons_arguments(name, value):
    spec = open_checkpoint(oracle.GOLDEN / "megatron" / "a_llama_legacy_tp2pp2" / "checkpoint").spec
    _, notes = read_args({**write_args(spec), name: value}, "x", spec.vocab)
    assert [note.name for note in notes if isinstance(note, Unknown)] == [f"args.{name}"]


@pytest.mark.parametrize("multiplier", [1e308, -1.0, 0, [1]])
def test_a_multiplier_that_makes_no_sense_is_named(multiplier, tmp_path):
    notes = open_checkpoint(meta(tmp_path / "source", ffn_dim_multiplier=multiplier)).notes
    assert any("ffn_dim_multiplier" in note and "make no sense" in note for note in notes)


def test_arguments_about_a_run_say_nothing():
    for name in ("wandb_project", "log_interval", "save_retain_interval", "data_cache_path", "reset_attention_mask"):
        assert is_inert(name, ())


def test_what_one_means_to_change_is_allowed_by_path_last_word_or_star():
    notes = ["plain", Unknown("model.block.softcap", 30.0), Unknown("sinks")]
    for allowed in ("softcap,sinks", "model.block.softcap,sinks", "*"):
        assert settle(notes, allowed, "x") == notes
    with pytest.raises(ConfigError, match=r"'sinks' is not understood"):
        settle(notes, "softcap", "x")
    with pytest.raises(ConfigError, match=r"model\.block\.softcap.*sinks") as error:
        settle(notes, "block", "x")
    assert "--allow-unknown softcap --allow-unknown sinks" in error.value.hint


def test_inspect_shows_what_convert_refuses(tiny_hf, tmp_path):
    source = hf(tiny_hf("llama"), tmp_path / "source", softcap=30.0)
    done = run("inspect", source)
    assert done.exit_code == 0, done.output
    assert "'softcap' (30.0) is not understood" in " ".join(done.output.split())
    assert run("verify", source, tiny_hf("llama")).exit_code != 0


def test_what_is_allowed_is_kept_from_hugging_face_to_itself(tiny_hf, tmp_path):
    source = hf(tiny_hf("llama"), tmp_path / "source", softcap=30.0)
    surgery.convert(source, tmp_path / "out", to="hf", options={"allow_unknown": "softcap"})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["softcap"] == 30.0


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", {"partial_rotary_factor": 0.5}, "turns all of a head"),
        ("qwen3", {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.25}}, "turns all of a head"),
        ("llama", {"rope_theta": 5e5}, "rope_theta is 500000.0, but 10000.0"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "say different things"),
        ("ernie4_5_moe", {"moe_k": 3, "num_experts_per_tok": 2}, "moe_k is 3, but num_experts_per_tok"),
        ("mixtral", {"num_local_experts": 8, "num_experts": 4}, "num_local_experts is 8, but num_experts"),
        ("gpt2", {"hidden_size": 8}, "n_embd is .*, but hidden_size"),
        ("llama", {"pruned_heads": {"0": [1]}}, "pruned_heads"),
    ],
)
def test_two_readings_of_a_config_are_refused(tiny_hf, family, change, message):
    config = json.loads((tiny_hf(family) / "config.json").read_text())
    with pytest.raises(ConfigError, match=message):
        read_config({**config, **change}, "config.json")


def test_numbers_of_a_rope_that_nobody_knows(tiny_hf):
    config = json.loads((tiny_hf("llama") / "config.json").read_text())
    rope = {**config["rope_parameters"], "mrope_section": [1, 2, 2]}
    notes = read_config({**config, "rope_parameters": rope}, "config.json")[2]
    assert [n.name for n in notes if isinstance(n, Unknown)] == ["the rope's parameters.mrope_section"]


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2", "mixtral"])
def test_no_family_is_written_that_ignores_the_rotary_fraction(tiny_hf, family):
    spec = open_checkpoint(tiny_hf(family)).spec
    with pytest.raises(ConfigError, match="turns all of a head"):
        choose_family(spec.replace(rope=Rope(spec.rope.base, 0.5)))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.complex64])
def test_weights_that_are_no_plain_numbers(tiny_hf, tmp_path, dtype):
    source, name = tmp_path / "source", str(dtype).removeprefix("torch.")
    shutil.copytree(tiny_hf("llama"), source)
    tensors = load_file(source / "model.safetensors")
    for key in list(tensors):
        if "mlp" in key:
            tensors[key] = tensors[key].mul(3).to(dtype)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    for more in ({}, {"dtype": "bf16"}):
        with pytest.raises(ConfigError, match=f"'{name}' is not understood"):
            surgery.convert(source, tmp_path / "out", to="meta", **more)
    surgery.convert(source, tmp_path / "out", to="meta", options={"allow_unknown": name})
    again = open_checkpoint(tmp_path / "out", options={"allow_unknown": name})
    part = again.parts["layers.0.mlp.up"].full()
    assert oracle.same_bits(part, tensors["model.layers.0.mlp.up_proj.weight"])

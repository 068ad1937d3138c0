"""Merges without a table: folders of any family that agree name by name, and what is left to mergekit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mergekit.merge
import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import FileError, LayoutError, SurgeryError
from surgery.formats.hf.rope import both_spellings
from surgery.merging.depth import fitted
from surgery.merging.mergekit import _compared
from surgery.merging.recipe import parse_recipe
from surgery.merging.way import MERGEKIT, NAMES, TABLE, way
from surgery.running.expected import check_loads, readable
from surgery.running.loading import quiet

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip


def deepseek() -> Any:
    """Its first layer has no experts, from which mergekit concludes that none has."""
    return T.DeepseekV3ForCausalLM(T.DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4}, kv_lora_rank=8, q_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4,
        v_head_dim=8, head_dim=4, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
        moe_intermediate_size=24, first_k_dense_replace=1, n_group=1, topk_group=1))  # fmt: skip


def llava() -> Any:
    seen = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 32, "patch_size": 8}  # fmt: skip
    config = T.LlavaConfig(vision_config=T.CLIPVisionConfig(**seen), text_config=T.LlamaConfig(**SMALL),
                           image_seq_length=16)  # fmt: skip
    return T.LlavaForConditionalGeneration(config)


MODELS: dict[str, Callable[[], Any]] = {
    "experts behind a dense layer": deepseek,
    "a model that sees": llava,
    "reward model": lambda: T.LlamaForSequenceClassification(T.LlamaConfig(**SMALL, num_labels=1)),
    "classifier of tokens": lambda: T.Qwen2ForTokenClassification(T.Qwen2Config(**SMALL, num_labels=3)),
    "embedding model": lambda: T.MistralModel(T.MistralConfig(**SMALL)),
    "encoder": lambda: T.BertForMaskedLM(T.BertConfig(**{k: v for k, v in SMALL.items() if "key" not in k})),
    "fused projections": lambda: T.Phi3ForCausalLM(T.Phi3Config(**SMALL)),
}


def saved(make: Callable[[], Any], folder: Path, count: int = 2) -> list[Path]:
    out = []
    for i in range(count):
        torch.manual_seed(i)
        with quiet():
            make().to(torch.bfloat16).save_pretrained(folder / f"m{i}")
        out.append(folder / f"m{i}")
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}


def mean(folders: list[Path], **more: Any) -> dict[str, Any]:
    models = [{"model": str(f), "parameters": {"weight": w}} for f, w in zip(folders, (0.75, 0.25), strict=True)]
    return {"merge_method": "linear", "models": models, **more}


@pytest.mark.parametrize("kind", MODELS)
def test_every_tensor_is_merged(kind: str, tmp_path: Path) -> None:
    folders = saved(MODELS[kind], tmp_path)
    recipe = mean(folders)
    assert way(parse_recipe(recipe), "hf").kind == NAMES
    report = surgery.soup(recipe, tmp_path / "out")
    a, b, out = (weights(f) for f in (*folders, tmp_path / "out"))
    assert out.keys() == a.keys() and report.verified
    for name, tensor in a.items():
        wanted = (tensor.float() * 0.75 + b[name].float() * 0.25).bfloat16() if tensor.is_floating_point() else tensor
        assert torch.equal(out[name], wanted), name
    with quiet():
        again = getattr(T, json.loads((tmp_path / "out" / "config.json").read_text())["architectures"][0])
        _, told = again.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values())
    assert json.loads((tmp_path / "out" / "soup.json").read_text())["method"] == "linear"
    with pytest.raises(SurgeryError, match="Hugging Face folders only"):
        surgery.soup(recipe, tmp_path / "no", to="meta")


def test_a_filter_that_fits_nothing_is_told(tmp_path: Path) -> None:
    """Names are those of the files: what a class calls its tensors in memory may be another."""
    recipe = mean(saved(llava, tmp_path))
    recipe["models"][0]["parameters"]["weight"] = [
        {"filter": "vision_tower", "value": 0.5}, {"filter": "model.vision_tower", "value": 0.25}, {"value": 0.75}
    ]  # fmt: skip
    told = [n for n in surgery.soup(recipe, tmp_path / "out").notes if "filter" in n]
    assert told == ["no tensor's name holds the filter 'model.vision_tower'"]


LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip


@pytest.mark.parametrize(
    ("make", "theta", "scaling"),
    [
        (lambda: T.Gemma2ForCausalLM(T.Gemma2Config(**SMALL, head_dim=8)), 1e4, None),
        (lambda: T.LlamaForSequenceClassification(T.LlamaConfig(**SMALL, rope_parameters=LLAMA3)), 5e5,
         {k: v for k, v in LLAMA3.items() if k != "rope_theta"}),
        (lambda: T.StableLmForCausalLM(T.StableLmConfig(**SMALL)), 1e4, None),
    ],
)  # fmt: skip
def test_older_programs_read_the_rope_as_well(make: Callable[[], Any], theta: float, scaling: Any, tmp_path: Path):
    folders = saved(make, tmp_path)
    surgery.soup(mean(folders), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["rope_theta"], config.get("rope_scaling")) == (theta, scaling)
    read = [T.AutoConfig.from_pretrained(folder).rope_parameters for folder in (folders[0], tmp_path / "out")]
    assert read[0] == read[1]
    assert config.get("partial_rotary_factor") == read[0].get("partial_rotary_factor")


def test_a_rope_that_the_classic_keys_cannot_say_stays_as_it_is():
    for rope in ({"full_attention": {"rope_theta": 1.0}}, {"rope_type": "default", "rope_theta": 1e6, "mrope": [2, 1]}):
        assert both_spellings({"rope_parameters": rope}) == {"rope_parameters": rope}
    inner = {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    assert both_spellings({"text_config": inner})["text_config"] == {**inner, "rope_theta": 7.0}
    assert readable({"model_type": "unheard-of", **inner}) == {"model_type": "unheard-of", **inner}


def test_what_is_no_number_is_counted_and_its_model_named(tmp_path: Path) -> None:
    folders = saved(MODELS["reward model"], tmp_path)
    held = weights(folders[1])
    held["score.weight"][0, :3] = float("nan")
    save_file(held, folders[1] / "model.safetensors", {"format": "pt"})
    report = surgery.soup(mean(folders), tmp_path / "out")
    (note,) = [note for note in report.notes if "NaN" in note]
    assert note.startswith("weights NaN or infinite: 3 in all, in score.weight (3)") and f"{folders[1]} (3)" in note
    assert note in json.loads((tmp_path / "out" / "surgery.json").read_text())["notes"]


def test_values_that_the_last_cast_loses_are_counted(tmp_path: Path) -> None:
    folder = saved(MODELS["reward model"], tmp_path, 1)[0]
    held = weights(folder)
    held["score.weight"][0, :3] = torch.tensor([1e6, 1e-9, 1e-10])
    held["score.places"] = torch.arange(4)  # no weights, and never cast
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    recipe = {"merge_method": "linear", "models": [{"model": str(folder), "parameters": {"weight": 1}}]}
    report = surgery.soup({**recipe, "dtype": "float16"}, tmp_path / "out")
    assert [note for note in report.notes if "in all" in note] == [
        "weights too large for float16 became infinite: 1 in all, in score.weight (1)",
        "weights too small for float16 became 0: 2 in all, in score.weight (2)",
    ]
    assert weights(tmp_path / "out")["score.weight"].dtype == torch.float16


def test_numbers_without_end_in_names_are_names(tmp_path: Path) -> None:
    folders = saved(MODELS["reward model"], tmp_path)
    odd = {f"model.layers.{'9' * 5000}.x": torch.ones(2), "model.layers.0.²": torch.ones(3)}
    for folder in folders:
        save_file({**weights(folder), **odd}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SurgeryError, match="transformers"):  # which has no place for them
        surgery.soup(mean(folders), tmp_path / "out")


def test_files_of_a_few_bytes_are_refused(tmp_path: Path) -> None:
    folders = saved(MODELS["reward model"], tmp_path)
    with pytest.raises(SurgeryError, match="too little"):
        surgery.soup(mean(folders), tmp_path / "out", options={"shard_size": "5"})


def test_methods_and_memory_give_the_same_bits(tmp_path: Path) -> None:
    a, b = saved(MODELS["fused projections"], tmp_path)
    recipe = {"merge_method": "task_arithmetic", "base_model": str(a),
              "models": [{"model": str(b), "parameters": {"weight": [0.2, 1.0]}}]}  # fmt: skip
    one = surgery.soup(recipe, tmp_path / "one").content_digest
    assert surgery.soup(recipe, tmp_path / "two", max_memory=1 << 24, threads=1).content_digest == one
    # the weight grows from layer to layer
    base, other, out = weights(a), weights(b), weights(tmp_path / "one")
    moved = [float((out[n] - base[n]).float().norm() / (other[n] - base[n]).float().norm())
             for n in (f"model.layers.{i}.mlp.down_proj.weight" for i in range(3))]  # fmt: skip
    assert moved == sorted(moved)


def test_layers_may_be_stacked(tmp_path: Path) -> None:
    """Of a family with a list by layer in its config."""
    folders = saved(lambda: T.SmolLM3ForCausalLM(T.SmolLM3Config(**SMALL, no_rope_layers=[1, 0, 1])), tmp_path)
    of = [
        {"sources": [{"model": str(f), "layer_range": span}]} for f, span in zip(folders, ([0, 2], [1, 3]), strict=True)
    ]
    surgery.soup({"merge_method": "passthrough", "slices": of}, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["no_rope_layers"]) == (4, [1, 0, 0, 1])
    a, b, out = (weights(f) for f in (*folders, tmp_path / "out"))
    q = "model.layers.{}.self_attn.q_proj.weight".format
    assert torch.equal(out[q(1)], a[q(1)]) and torch.equal(out[q(3)], b[q(2)])
    assert torch.equal(out["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert torch.equal(out["model.norm.weight"], b["model.norm.weight"])
    with quiet():
        T.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_families_with_a_table_keep_a_list_by_layer_as_long_as_they_are_deep(tmp_path: Path) -> None:
    folders = saved(lambda: T.Qwen3ForCausalLM(T.Qwen3Config(**SMALL, head_dim=8)), tmp_path)
    assert "layer_types" in (folders[0] / "config.json").read_text()
    for name, spans in (("taller", ([0, 2], [1, 3])), ("shorter", ([0, 1], [2, 3]))):
        of = [{"sources": [{"model": str(f), "layer_range": s}]} for f, s in zip(folders, spans, strict=True)]
        recipe = {"merge_method": "passthrough", "slices": of}
        assert way(parse_recipe(recipe), "hf").kind == TABLE
        surgery.soup(recipe, tmp_path / name)
        with quiet():
            model = T.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert len(model.config.layer_types) == model.config.num_hidden_layers == len(model.model.layers)


@pytest.mark.parametrize("family", ["gemma2", "smollm3"])
def test_layers_keep_their_kind_where_a_file_leaves_it_to_the_program(family: str, tmp_path: Path) -> None:
    """Older files have no `layer_types`: transformers makes them of the layers' numbers, which a merge changes."""
    if family == "gemma2":
        config: Any = T.Gemma2Config(**{**SMALL, "num_hidden_layers": 4}, head_dim=8, sliding_window=4)
    else:
        config = T.SmolLM3Config(**{**SMALL, "num_hidden_layers": 4}, no_rope_layer_interval=2)
    (folder,) = saved(lambda: T.AutoModelForCausalLM.from_config(config), tmp_path, 1)
    file = folder / "config.json"
    said = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("layer_types", "no_rope_layers")}
    file.write_text(json.dumps({**said, **({"no_rope_layer_interval": 2} if family == "smollm3" else {})}))
    order = [1, 2, 2, 3]
    slices = [{"sources": [{"model": str(folder), "layer_range": [i, i + 1]}]} for i in order]
    surgery.soup({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")
    ids = torch.arange(24).reshape(1, -1)
    with quiet(), torch.inference_mode():
        kept, out = (T.AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (folder, tmp_path / "out"))
        for key in ("layer_types", "no_rope_layers"):
            if old := getattr(kept.config, key, None):
                assert getattr(out.config, key) == [old[i] for i in order]
                setattr(kept.config, key, [old[i] for i in order])
        kept.model.layers = torch.nn.ModuleList(kept.model.layers[i] for i in order)
        assert torch.equal(*(model(ids, use_cache=False).logits for model in (kept, out)))


def test_lists_by_layer() -> None:
    a = {"num_hidden_layers": 3, "layer_types": ["x", "y", "z"], "mlp_only_layers": [0], "eos_token_id": [1, 2, 3]}
    b = {"num_hidden_layers": 2, "layer_types": ["p", "q"], "mlp_only_layers": [1]}
    made = fitted(a, [(a, 0), (a, 2), (b, 0), (b, 1)])
    assert made == {"num_hidden_layers": 4, "layer_types": ["x", "z", "p", "q"], "mlp_only_layers": [0, 3],
                    "eos_token_id": [1, 2, 3]}  # fmt: skip
    below = {"model_type": "m", "text_config": a}
    assert fitted(below, [(below, 1)])["text_config"]["layer_types"] == ["y"]
    assert fitted(a, [(a, 0), (a, 1), (a, 2)]) == a


def test_models_that_do_not_agree_are_mergekits(tmp_path: Path) -> None:
    a, b = saved(MODELS["fused projections"], tmp_path)
    for change, words in (("shape", "lm_head.weight"), ("name", "extra.weight")):
        other = tmp_path / change
        shutil.copytree(b, other)
        tensors = load_file(other / "model.safetensors")
        tensors |= {"lm_head.weight": torch.ones(65, 32)} if change == "shape" else {"extra.weight": torch.ones(2)}
        save_file(tensors, other / "model.safetensors", {"format": "pt"})
        chosen = way(parse_recipe(mean([a, other])), "hf")
        assert chosen.kind == MERGEKIT and words in chosen.why
    assert way(parse_recipe(mean([a, b], tokenizer_source="union")), "hf").kind == MERGEKIT


def test_a_model_that_changes_while_mergekit_reads_it_is_an_error(tmp_path: Path, monkeypatch: Any) -> None:
    a, b = saved(MODELS["fused projections"], tmp_path)
    save_file({**load_file(b / "model.safetensors"), "odd": torch.ones(2)}, b / "model.safetensors", {"format": "pt"})
    merge = mergekit.merge.run_merge

    def while_saved(*args: Any, **more: Any) -> None:
        merge(*args, **more)
        save_file(load_file(b / "model.safetensors"), b / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(mergekit.merge, "run_merge", while_saved)
    with pytest.raises(FileError, match="was changed while it was read"):
        surgery.soup(mean([a, b]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_mergekit_loses_is_not_published(tmp_path: Path) -> None:
    donor = saved(deepseek, tmp_path, 1)[0]
    assert not _compared(donor, donor)
    shutil.copytree(donor, tmp_path / "lost")
    tensors = load_file(donor / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if ".experts." not in n}, tmp_path / "lost" / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    with pytest.raises(LayoutError, match=r"no model\.layers\.1\.mlp\.experts"):
        _compared(tmp_path / "lost", donor)


def test_whether_a_folder_loads(tmp_path: Path) -> None:
    folder = saved(MODELS["reward model"], tmp_path, 1)[0]
    assert check_loads(folder) == ""
    tensors = load_file(folder / "model.safetensors")
    for name, edit in (("less", lambda t: t.pop("score.weight")), ("more", lambda t: t.update(odd=torch.ones(2)))):
        shutil.copytree(folder, tmp_path / name)
        changed = dict(tensors)
        edit(changed)
        save_file(changed, tmp_path / name / "model.safetensors", {"format": "pt"})
        with pytest.raises(LayoutError, match=r"score\.weight|odd"):
            check_loads(tmp_path / name)
        assert check_loads(tmp_path / name, donor=tmp_path / name) == ""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["Nobody"]}))
    assert "transformers has no class" in check_loads(folder)

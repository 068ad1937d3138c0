"""Soups end to end: the whole of mergekit's YAML against mergekit, formats mixed, refusals, the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner

import surgery
from surgery.cli import main as cli
from surgery.errors import ConfigError, FileError, LayoutError, OutputError, SurgeryError, UsageError
from surgery.formats.registry import open_checkpoint
from surgery.formats.topology import Topology
from surgery.merging import run
from surgery.merging.recipe import parse_recipe
from surgery.merging.request import Soup
from tests import merges, tiny
from tests.test_conversion import weights


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Three fp32 models of five layers: names a, b, c."""
    return merges.models("llama", tmp_path_factory.mktemp("deep"), 3, "float32", l=5)


def config_of(text, folders):
    """YAML whose models are A, B, C."""
    for name, folder in zip("ABC", folders, strict=False):
        text = text.replace(f"<{name}>", folder)
    return yaml.safe_load(text)


def same_as_mergekit(config, tmp_path, **options):
    report = surgery.soup(config, tmp_path / "ours", **options)
    merges.mergekit(config, tmp_path / "theirs")
    assert merges.differences(tmp_path / "ours", tmp_path / "theirs") == []
    ours, theirs = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("ours", "theirs"))
    for key in ("num_hidden_layers", "vocab_size", "hidden_size", "tie_word_embeddings"):
        assert ours.get(key) == theirs.get(key), key
    assert (ours.get("torch_dtype") or ours["dtype"]) == (theirs.get("torch_dtype") or theirs["dtype"])
    return report


YAMLS = {
    "gradients and filters": """
        merge_method: slerp
        base_model: <A>
        models: [{model: <A>}, {model: <B>}]
        parameters:
          t:
            - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
            - {filter: mlp, value: [1, 0.5]}
            - {filter: "norm", value: 0.25}
            - {value: 0.5}
        dtype: bfloat16
        """,
    "per-model gradients": """
        merge_method: linear
        models:
          - {model: <A>, parameters: {weight: [0, 1.0]}}
          - {model: <B>, parameters: {weight: [{filter: q_proj, value: 0.9}, {filter: "*", value: [1, 0.2, 0.1]}]}}
          - {model: <C>, parameters: {weight: 1e-1}}
        parameters: {normalize: "yes"}
        out_dtype: float16
        """,
    "slices": """
        merge_method: linear
        slices:
          - sources:
              - {model: <A>, layer_range: [0, 2], parameters: {weight: 0.5}}
              - {model: <B>, layer_range: [1, 3], parameters: {weight: 0.7}}
          - sources:
              - {model: <B>, layer_range: [0, 4]}
              - {model: <C>, layer_range: [1, 5]}
            parameters: {weight: [0.3, 0.9]}
        """,
    "frankenmerge": """
        merge_method: passthrough
        slices:
          - sources: [{model: <A>, layer_range: [0, 4]}]
          - sources: [{model: <B>, layer_range: [2, 5]}]
          - sources:
              - {model: <A>, layer_range: [1, 2], parameters: {scale: [{filter: o_proj, value: 0.0}, {value: 1.0}]}}
        """,
    "slice with a base of its own": """
        merge_method: task_arithmetic
        base_model: <A>
        slices:
          - sources: [{model: <A>, layer_range: [0, 3]}, {model: <B>, layer_range: [0, 3]}]
            parameters: {weight: 0.4}
          - sources: [{model: <C>, layer_range: [2, 4]}, {model: <B>, layer_range: [2, 4]}]
            base_model: <C>
            parameters: {lambda: [0.5, 1.5]}
        parameters: {weight: 1.1, lambda: 0.9}
        """,
    "a module": """
        merge_method: ties
        base_model: <A>
        modules:
          default:
            models:
              - {model: <B>, parameters: {density: [0.2, 0.9], weight: 0.4}}
              - {model: <C>, parameters: {weight: 0.3}}
            parameters: {density: 0.5, int8_mask: true}
        parameters: {density: 0.1, normalize: false}
        """,
    "a module of slices": """
        merge_method: slerp
        base_model: <A>
        modules:
          default:
            slices:
              - sources: [{model: <A>, layer_range: [0, 2]}, {model: <B>, layer_range: [0, 2]}]
                parameters: {t: 0.1}
              - sources: [{model: <A>, layer_range: [2, 5]}, {model: <B>, layer_range: [2, 5]}]
            parameters: {t: [0.9, 0.2]}
        """,
    "the long spelling of models": """
        merge_method: linear
        models:
          - model: {model: {path: <A>}}
            parameters: {weight: 1}
          - model: {model: <B>, lora: null}
            parameters: {weight: 2}
        dtype: float32
        """,
}


@pytest.mark.parametrize("name", YAMLS)
def test_yaml(name, deep, tmp_path):
    same_as_mergekit(config_of(YAMLS[name], deep), tmp_path, arithmetic="mergekit")


@pytest.mark.parametrize("family", ["llama_tied", "mistral", "qwen3_moe"])
def test_families(family, tmp_path):
    changes = {"mlp_only_layers": []} if family == "qwen3_moe" else {}
    a, b, c = merges.models(family, tmp_path, 3, "bfloat16", **changes)
    text = """
        merge_method: ties
        base_model: <A>
        models: [{model: <B>, parameters: {weight: 0.6}}, {model: <C>, parameters: {weight: 0.5}}]
        parameters: {density: 0.4}
        dtype: float32
        out_dtype: bfloat16
        """
    with merges.ties_by_place():
        report = same_as_mergekit(config_of(text, (a, b, c)), tmp_path)
    assert report.verified
    assert report.source_digest is None


def test_an_adapter_is_merged_first(deep, tmp_path):
    """path+lora, against peft's arithmetic written out."""
    import torch
    from safetensors.torch import save_file

    lora = tmp_path / "lora"
    lora.mkdir()
    name, generator = "model.layers.3.mlp.up_proj", torch.Generator().manual_seed(2)
    a, b = torch.randn((2, 60), generator=generator), torch.randn((84, 2), generator=generator)
    prefix = f"base_model.model.{name}."
    save_file({prefix + "lora_A.weight": a, prefix + "lora_B.weight": b}, lora / "adapter_model.safetensors")
    (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6}))
    surgery.soup({"merge_method": "passthrough", "models": [{"model": f"{deep[0]}+{lora}"}]}, tmp_path / "out")
    ours, base = weights(tmp_path / "out"), weights(Path(deep[0]))
    assert torch.equal(ours[name + ".weight"], base[name + ".weight"] + (b @ a) * 3.0)
    assert all(torch.equal(ours[k], base[k]) for k in base if k != name + ".weight")
    (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "use_dora": True}))
    with pytest.raises(ConfigError, match="use_dora"):
        surgery.soup({"merge_method": "passthrough", "models": [{"model": f"{deep[0]}+{lora}"}]}, tmp_path / "no")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Three fine-tunes as Hugging Face folders, and the same as HF, Meta tp2 and Megatron tp2 pp2."""
    folder = tmp_path_factory.mktemp("mixed")
    hf = merges.models("llama", folder, 3, "bfloat16", l=4)
    surgery.convert(hf[1], folder / "meta", to="meta", topology=Topology(tp=2))
    surgery.convert(hf[2], folder / "megatron", to="megatron", topology=Topology(tp=2, pp=2))
    return hf, [hf[0], str(folder / "meta"), str(folder / "megatron")]


def mean(folders, **more):
    return {"merge_method": "linear", "models": [{"model": f, "parameters": {"weight": 1}} for f in folders], **more}


def test_a_soup_of_three_formats_is_that_of_their_conversions(mixed, tmp_path):
    """One Hugging Face, one Meta tp2 and one Megatron tp2 pp2 model."""
    hf, others = mixed
    surgery.soup(mean(hf), tmp_path / "plain")
    report = surgery.soup(mean(others), tmp_path / "mixed")
    assert merges.differences(tmp_path / "plain", tmp_path / "mixed") == []
    merges.mergekit(mean(hf, dtype="float32", out_dtype="bfloat16"), tmp_path / "theirs")
    assert merges.differences(tmp_path / "mixed", tmp_path / "theirs") == []
    assert report.notes[0] == f"config and tokenizer of {hf[0]}, the first model named"
    straight = surgery.soup(mean(others), tmp_path / "megatron", to="megatron", topology=Topology(tp=2, pp=2))
    assert straight.content_digest == report.content_digest
    for method in ("ties", "slerp", "dare_ties", "sce"):
        pair = [{"model": m, "parameters": {"weight": 1, "density": 0.5}} for m in hf[:2]]
        if method in ("slerp", "sce"):
            pair = [{"model": m} for m in hf[:2]]
        of = dict(zip(hf, others, strict=True))
        config = {"merge_method": method, "models": pair, "base_model": hf[0]}
        if method == "slerp":
            config["parameters"] = {"t": 0.3}
        turned = {**config, "models": [{**m, "model": of[m["model"]]} for m in pair], "base_model": of[hf[0]]}
        first = surgery.soup(config, tmp_path / f"{method}-hf", verify=False)
        second = surgery.soup(turned, tmp_path / f"{method}-mixed", verify=False)
        assert first.content_digest == second.content_digest, method


def test_the_same_yaml_gives_the_same_bytes(mixed, tmp_path):
    """Whatever the memory, the threads and the run; another seed gives others."""
    hf, _ = mixed
    config = {"merge_method": "dare_ties", "base_model": hf[0], "seed": 5,
              "models": [{"model": m, "parameters": {"weight": 0.5, "density": 0.4}} for m in hf[1:]]}  # fmt: skip
    digests = [
        surgery.soup(config, tmp_path / "a", threads=1).content_digest,
        surgery.soup(config, tmp_path / "b", threads=3, max_memory=1 << 16).content_digest,
        surgery.soup({**config, "seed": 6}, tmp_path / "c").content_digest,
    ]
    assert digests[0] == digests[1] != digests[2]


def test_a_soup_that_was_stopped_goes_on(mixed, tmp_path):
    hf, _ = mixed
    config = {"merge_method": "ties", "base_model": hf[0],
              "models": [{"model": m, "parameters": {"weight": 0.5, "density": 0.4}} for m in hf[1:]]}  # fmt: skip
    done = 0

    def stop(n):
        nonlocal done
        done += n
        if done > 60_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        surgery.soup(config, tmp_path / "out", max_memory=1 << 18, progress=stop)
    assert not (tmp_path / "out").exists()
    report = surgery.soup(config, tmp_path / "out", max_memory=1 << 18)
    assert 0 < report.resumed_bytes < report.bytes
    assert report.content_digest == surgery.soup(config, tmp_path / "other").content_digest


def test_the_donor_is_the_base_or_the_first_model(mixed, tmp_path):
    hf, _ = mixed
    for i, folder in enumerate(hf):
        copy = shutil.copytree(folder, tmp_path / f"m{i}")
        settings = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**settings, "bos_token_id": 10 + i}))
    names = [str(tmp_path / f"m{i}") for i in (1, 0, 2)]
    surgery.soup(mean(names), tmp_path / "first")
    surgery.soup(mean(names, base_model=str(tmp_path / "m2")), tmp_path / "base")
    for out, id_ in (("first", 11), ("base", 12)):
        assert json.loads((tmp_path / out / "config.json").read_text())["bos_token_id"] == id_
        assert json.loads((tmp_path / out / "soup.json").read_text())["donor"] == str(tmp_path / f"m{id_ - 10}")


def test_what_differs_between_models_is_told_or_refused(mixed, tmp_path):
    hf, _ = mixed
    other = tiny.save("llama", tmp_path / "other", **{**merges.SMALL, "l": 4}, rms_norm_eps=3e-4)
    report = surgery.soup(mean([hf[0], str(other)]), tmp_path / "eps")
    assert any("norm_eps" in note and "0.0003" in note for note in report.notes)
    wide = tiny.save("llama", tmp_path / "wide", **{**merges.SMALL, "l": 4, "f": 88})
    with pytest.raises(LayoutError, match="ffn width 88 in"):
        surgery.soup(mean([hf[0], str(wide)]), tmp_path / "no")
    short = tiny.save("llama", tmp_path / "short", **{**merges.SMALL, "l": 3})
    with pytest.raises(LayoutError, match="different numbers of layers"):
        surgery.soup(mean([hf[0], str(short)]), tmp_path / "no")
    rows = tiny.save("llama", tmp_path / "rows", **{**merges.SMALL, "l": 4, "v": 80})
    with pytest.raises(LayoutError, match=r"embed_tokens.*different shapes"):
        surgery.soup(mean([hf[0], str(rows)]), tmp_path / "no")
    assert not (tmp_path / "no").exists()


WRONG = {
    "merge_metod: linear": "'merge_metod' is no key here; did you mean merge_method?",
    "merge_method: slurp": "merge_method: is 'slurp'; did you mean slerp?",
    "parameters: {normalise: true}": "'normalise' is no key here; did you mean normalize?",
    "models: [{model: <A>, parameters: {wieght: 1}}]": "'wieght' is no key here; did you mean weight?",
    "models: [{modle: <A>}]": "'modle' is no key here; did you mean model?",
    "models: [{model: <A>, parameters: {weight: [{filtre: q, value: 1}]}}]": "'filtre' is no key here",
    "models: [{model: <A>, parameters: {weight: [{filter: q}]}}]": "value is missing",
    "models: [{model: <A>, parameters: {weight: heavy}}]": "weight is 'heavy', not a float",
    "models: [{model: <A>}]": "weight of",
    "models: [{model: <A>, parameters: {weight: 1}}, {model: <A>, parameters: {weight: 1}}]": "is named twice",
    "models: []": "one of models, slices and modules is needed",
    "dtype: bf16": "dtype: is 'bf16'; did you mean bfloat16?",
    "tokenizer: {source: union, token: {}}": "'token' is no key here; did you mean tokens?",
    "tokenizer_source: union\ntokenizer: {source: base}": "exclude each other",
    "slices: [{sources: [{model: <A>, layer_range: [0, 2]}]}]": "one of models, slices and modules",
    "seed: -1": "seed: is -1, not a whole number",
    "align: expert": "align: is 'expert'; did you mean experts?",
    "align: experts": "the models have no experts",
    "chat_template: 7": "chat_template: is 7, not a text",
}


@pytest.mark.parametrize("line", WRONG)
def test_mistakes_are_named(line, deep, tmp_path):
    """Replacing or adding a line to a right file."""
    right = {"merge_method": "linear", "models": [{"model": deep[0], "parameters": {"weight": 1}}]}
    wrong = {**right, **config_of(line, deep)}
    if "merge_metod" in wrong:
        del wrong["merge_method"]
    path = tmp_path / "soup.yaml"
    path.write_text(yaml.safe_dump(wrong))
    with pytest.raises(SurgeryError) as caught:
        surgery.soup(path, tmp_path / "out")
    said = str(caught.value).replace("\n  hint: ", "; ")
    assert WRONG[line] in said, said
    assert not (tmp_path / "out").exists()


def test_contracts_of_methods():
    a, b = {"model": "a", "parameters": {"weight": 1}}, {"model": "b", "parameters": {"weight": 1}}
    for config, what in (
        ({"merge_method": "ties", "models": [a, b]}, "ties needs a base model"),
        ({"merge_method": "slerp", "base_model": "a", "models": [{"model": "a"}]}, "exactly 2 models, not 1"),
        ({"merge_method": "passthrough", "models": [{"model": "a"}, {"model": "b"}]}, "exactly 1 model, not 2"),
        ({"merge_method": "model_stock", "base_model": "a", "models": [{"model": "b"}]}, "at least 3"),
        ({"merge_method": "nuslerp", "models": [a]}, "exactly 2"),
    ):
        with pytest.raises(ConfigError, match=what):
            parse_recipe(config)


def test_what_is_missing_is_told(deep, tmp_path):
    with pytest.raises(FileError, match="hf download"):
        surgery.soup(mean([deep[0], "owner/name-nobody-has"]), tmp_path / "out")
    with pytest.raises(FileError):
        surgery.soup(tmp_path / "none.yaml", tmp_path / "out")
    with pytest.raises(UsageError, match="no format"):
        surgery.soup(mean(deep), tmp_path / "out", to="gguf")
    with pytest.raises(OutputError, match="lie within each other"):
        surgery.soup(mean(deep), Path(deep[1]) / "out")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("keep")
    with pytest.raises(OutputError):
        surgery.soup(mean(deep), tmp_path / "taken")


def test_a_filter_that_fits_nothing_is_told(deep, tmp_path):
    weight = [{"filter": "self_atn", "value": 3}, {"value": 1}]
    report = surgery.soup(mean(deep[:1]) | {"parameters": {"weight": weight}}, tmp_path / "out")
    assert report.verified
    config = {"merge_method": "linear", "models": [{"model": deep[0], "parameters": {"weight": weight}}]}
    report = surgery.soup(config, tmp_path / "again")
    assert any("self_atn" in note for note in report.notes)


def test_hub_ids_are_looked_up_in_the_cache(deep, tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / "0123"
    shutil.copytree(deep[1], snapshot)
    refs = tmp_path / "hub" / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    by_id = surgery.soup(mean([deep[0], "some/model"]), tmp_path / "a").content_digest
    assert by_id == surgery.soup(mean(deep[:2]), tmp_path / "b").content_digest
    assert by_id == surgery.soup(mean([deep[0], "some/model@0123"]), tmp_path / "c").content_digest


def test_what_only_mergekit_knows_is_done_by_mergekit(tmp_path):
    """A family without a table, models that do not agree; the donor is the first model named all the same."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    folders = []
    for i in range(2):
        torch.manual_seed(i)
        sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
        config = AutoConfig.for_model("stablelm", **sizes, num_key_value_heads=2, vocab_size=32, bos_token_id=i)
        folders.append(str(tmp_path / f"m{i}"))
        AutoModelForCausalLM.from_config(config).save_pretrained(folders[-1])
    odd = load_file(tmp_path / "m1" / "model.safetensors") | {"odd": torch.ones(2)}
    save_file(odd, tmp_path / "m1" / "model.safetensors", {"format": "pt"})
    report = surgery.soup(mean(folders), tmp_path / "out")
    assert any("merged by mergekit" in note and "stablelm" in note for note in report.notes)
    merges.mergekit(mean(folders), tmp_path / "theirs")
    ours, theirs = weights(tmp_path / "out"), weights(tmp_path / "theirs")
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["bos_token_id"] == 0 and written["rope_theta"] == written["rope_parameters"]["rope_theta"]
    odd["lm_head.weight"][3, :2] = torch.nan
    save_file(odd, tmp_path / "m1" / "model.safetensors", {"format": "pt"})
    notes = surgery.soup(mean(folders), tmp_path / "nan").notes
    assert [n for n in notes if "NaN" in n] == ["weights NaN or infinite: 2 in all, in lm_head.weight (2)"]
    with pytest.raises(UsageError, match="Hugging Face folders only"):
        surgery.soup(mean(folders), tmp_path / "no", to="meta")
    llama = str(tiny.save("llama", tmp_path / "llama"))
    with pytest.raises(ConfigError, match="of different architectures"):
        surgery.soup(mean([folders[0], llama]), tmp_path / "no")


def test_command_line(mixed, tmp_path):
    hf, others = mixed
    path = tmp_path / "soup.yaml"
    path.write_text(yaml.safe_dump(mean(others)))
    run_ = CliRunner().invoke
    planned = run_(cli.main, ["soup", str(path), str(tmp_path / "out"), "--dry-run"])
    assert planned.exit_code == 0, planned.output
    assert "would merge, by linear of" in planned.output
    assert "config and tokenizer of" in planned.output
    assert not (tmp_path / "out").exists()
    done = run_(cli.main, ["soup", str(path), str(tmp_path / "out"), "--to", "meta", "--tp", "2", "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.output)
    assert report["verified"]
    assert report["topology"] == {"tp": 2}
    assert report["content_digest"] == surgery.soup(mean(hf), tmp_path / "same").content_digest
    assert open_checkpoint(tmp_path / "out").format == "meta"
    again = run_(cli.main, ["soup", str(path), str(tmp_path / "out")])
    assert again.exit_code == 1
    assert "exists already" in again.output
    shown = run_(cli.main, ["soup", str(path), str(tmp_path / "out"), "--force", "--threads", "2"])
    assert "linear of" in shown.output
    assert "read back and equal" in shown.output
    for flags in (["--greedy"], ["--eval", str(path)], ["--greedy", "--search", "3", "--eval", str(path)]):
        assert run_(cli.main, ["soup", str(path), str(tmp_path / "x"), *flags]).exit_code == 2


def test_who_brought_values_that_are_no_numbers_is_named(deep, tmp_path):
    from safetensors.torch import load_file, save_file

    odd = tmp_path / "odd"
    shutil.copytree(deep[1], odd)
    file = odd / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0, :3] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    notes = surgery.soup(mean([deep[0], str(odd)]), tmp_path / "out").notes
    assert f"weights NaN or infinite: 3 in all, in layers.1.mlp.up (3); brought by {odd} (3)" in notes
    tensors["model.layers.1.mlp.up_proj.weight"][0, :3] = torch.finfo(torch.bfloat16).max
    save_file(tensors, file, {"format": "pt"})
    twice = mean([str(odd), deep[0]])
    twice["models"][0]["parameters"]["weight"] = 8
    notes = surgery.soup({**twice, "parameters": {"normalize": False}}, tmp_path / "far").notes
    assert [n for n in notes if n.endswith("what they are made of is finite")]


def test_record(mixed, tmp_path):
    hf, _ = mixed
    path = tmp_path / "soup.yaml"
    path.write_text("# three seeds\n" + yaml.safe_dump(mean(hf)))
    surgery.soup(path, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "soup.json").read_text())
    assert record["config"].startswith("# three seeds")
    assert list(record["models"]) == hf
    assert record["method"] == "linear"
    assert json.loads((tmp_path / "out" / "surgery.json").read_text())["source_digest"] is None
    with run.prepared(run.read(path), Soup()) as plan:
        assert plan.bytes > 0


@pytest.mark.parametrize("method", ["linear", "passthrough"])
def test_values_that_the_last_cast_loses_are_counted(method, deep, tmp_path):
    """As in conversions: too large ones become infinite, too small ones 0."""
    from safetensors.torch import load_file, save_file

    odd = tmp_path / "odd"
    shutil.copytree(deep[1], odd)
    tensors = load_file(odd / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, :3] = 1e6
    tensors["model.layers.1.mlp.down_proj.weight"][0, :2] = 1e-9
    save_file(tensors, odd / "model.safetensors", {"format": "pt"})
    recipe = {"merge_method": method, "models": [{"model": str(odd), "parameters": {"weight": 1}}], "dtype": "float16"}
    report = surgery.soup(recipe, tmp_path / "out")
    assert [note for note in report.notes if "in all" in note] == [
        "weights too large for float16 became infinite: 3 in all, in layers.1.mlp.up (3)",
        "weights too small for float16 became 0: 2 in all, in layers.1.mlp.down (2)",
    ]
    wanted = tensors["model.layers.1.mlp.up_proj.weight"].half()
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.mlp.up_proj.weight"], wanted)

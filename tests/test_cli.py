"""The command line: what it prints, how it exits, and that no user's mistake ends in a traceback."""

from __future__ import annotations

import json
import os
import re

import pytest
from click.testing import CliRunner

from surgery.cli import main as cli
from surgery.formats.registry import FORMATS
from surgery.units import count, human, parse_size
from tests import oracle

META = oracle.GOLDEN / "meta" / "llama31-mp2" / "checkpoint"


def run(*words):
    return CliRunner().invoke(cli.main, [str(w) for w in words])


def good(*words):
    done = run(*words)
    assert done.exit_code == 0, done.output
    return done.output


def test_help_teaches():
    text = good("--help")
    for word in ("inspect", "convert", "verify", "formats", "ask", "surgery convert Llama-2-7b"):
        assert word in text
    for command in cli.main.commands:
        text = good(command, "--help")
        assert "Usage:" in text
        assert len(text) > 200, command


def test_every_flag_is_explained():
    for name, command in cli.main.commands.items():
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert parameter.help, f"{name} {parameter.name}"


def test_inspect():
    text = good("inspect", META, "--pickles")
    for words in (
        "meta, tp 2",
        "llama",
        "layers",
        "scaled as llama3 (factor 8",
        "torch._utils._rebuild_tensor_v2",
        "note:",
    ):
        assert words in text
    found = json.loads(good("inspect", META, "--json", "--tensors", "--scan"))
    assert found["format"] == "meta"
    assert found["parallel"]["tp"] == 2
    assert found["parameters"]["total"] == sum(_size(p["shape"]) for p in found["parts"].values())
    assert found["dtypes"] == {"bfloat16": found["parameters"]["total"]}
    assert found["padding_rows"] == 0
    assert found["scan"]["nan_or_inf"] == {}
    assert found["scan"]["largest"] > 0


@pytest.mark.parametrize(("family", "to"), [("llama", "hf"), ("olmo2", "olmo-core")])
def test_shard_size_of_every_format_that_has_it(family, to, tiny_hf, tmp_path):
    """It is asked of the format, not of a name."""
    sizes = []
    for size in ("1GB", "50kB"):
        good("convert", str(tiny_hf(family)), str(tmp_path / size), "--to", to, "--shard-size", size)
        sizes.append(max(p.stat().st_size for p in (tmp_path / size).rglob("*") if p.is_file()))
    assert sizes[1] < sizes[0]


def _size(shape):
    n = 1
    for x in shape:
        n *= x
    return n


def test_inspect_counts_active_parameters(tiny_hf):
    found = json.loads(good("inspect", tiny_hf("mixtral"), "--json"))
    assert found["parameters"]["active"] < found["parameters"]["total"]
    assert found["sizes"]["experts"] == 8


def test_scan_finds_nan(tiny_hf, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    stored = load_file(tiny_hf("llama") / "model.safetensors")
    stored["model.layers.2.mlp.down_proj.weight"][3, 4] = torch.nan
    stored["model.norm.weight"][1] = torch.inf
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((tiny_hf("llama") / "config.json").read_bytes())
    found = json.loads(good("inspect", tmp_path, "--json", "--scan"))["scan"]["nan_or_inf"]
    assert found == {"layers.2.mlp.down": {"nan": 1, "inf": 0}, "final_norm": {"nan": 0, "inf": 1}}
    assert "layers.2.mlp.down: 1 NaN" in good("inspect", tmp_path, "--scan")


def test_dry_run_shows_the_plan_and_writes_nothing(tmp_path):
    text = good("convert", META, tmp_path / "out", "--to", "hf", "--dry-run")
    for words in (
        "would convert",
        "model.safetensors",
        "config.json",
        "note: params.json does not say the rope's factor",
    ):
        assert words in text
    plan = json.loads(good("convert", META, tmp_path / "out", "--to", "hf", "--dry-run", "--json"))
    assert not list(tmp_path.iterdir())
    good("convert", META, tmp_path / "out", "--to", "hf")
    for name, size in plan["files"].items():
        assert (tmp_path / "out" / name).stat().st_size == size


def test_convert_and_verify(tmp_path):
    report = json.loads(good("convert", META, tmp_path / "hf", "--to", "hf", "--json", "--max-memory", "64MiB"))
    assert report["verified"] is True
    text = good("convert", tmp_path / "hf", tmp_path / "meta", "--to", "meta", "--tp", "4")
    assert report["content_digest"] in text
    assert "read back and equal" in text
    same = json.loads(good("verify", META, tmp_path / "meta", "--json"))
    assert same["verdict"]


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["inspect", "no/such/folder"], 1, "does not exist"),
        (["convert", META / "params.json", "x", "--to", "hf"], 1, "a config of a model; the checkpoint is its folder"),
        (["convert", META, "x", "--to", "gguf"], 2, "there is no format 'gguf'"),
        (["convert", META, "x", "--to", "hf", "-O", "sideways"], 2, "write -O NAME=VALUE"),
        (["convert", META, "x", "--to", "hf", "-O", "nothing=1"], 2, "option nothing"),
        (["convert", META, "x", "--to", "hf", "-O", "family=bert"], 2, "takes auto"),
        (["convert", META, "x", "--to", "hf", "--tp", "2"], 2, "no --tp 2"),
        (["convert", META, "x", "--to", "meta", "--shard-size", "1GB"], 2, "does not apply to meta"),
        (["convert", META, "x", "--to", "hf", "--shard-size", "1GB", "-O", "shard_size=2GB"], 2, "are the same"),
        (["convert", META, "x", "--to", "hf", "--max-memory", "lots"], 2, "is no size"),
        (["convert", META, "x", "--to", "hf", "--max-memory", "0"], 2, "is no size"),
        (["convert", META, "x", "--to", "meta", "--tp", "3"], 1, "cannot divide 4 key/value heads"),
        (["convert", META, "x", "--to", "hf", "--tokenizer", "no/such"], 1, "no/such"),
        (["convert", META, "x", "--to", "hf", "--vocab-size", "9"], 1, "would cut tokens"),
        (["convert", META, META, "--to", "hf"], 1, "exists already"),
        (["formats", "gguf"], 2, "there is no format 'gguf'"),
        (["ask", META, "hi"], 1, "config.json"),
    ],
)
def test_mistakes_are_explained(words, status, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*words)
    assert done.exit_code == status, done.output
    assert text in done.output
    assert done.output.startswith("error: ")
    assert "Traceback" not in done.output
    assert not list(tmp_path.iterdir())


def test_formats_lists_every_option():
    text = good("formats")
    data = json.loads(good("formats", "--json"))
    assert data.keys() == FORMATS.keys()
    for name, form in FORMATS.items():
        assert name in text
        for option in form.options:
            assert f"-O {option.name}=" in text
            assert option.meaning
            if option.choices:
                assert option.default in option.choices
    assert "rope_factor" in good("formats", "meta")


def test_shard_size_goes_where_the_format_has_it(tmp_path):
    good("convert", META, tmp_path / "out", "--to", "olmo-core", "--shard-size", "20kB", "--no-verify")
    assert len(list((tmp_path / "out" / "model_and_optim").glob("*.distcp"))) > 1


def test_sizes():
    assert parse_size("5GB") == 5_000_000_000
    assert parse_size("512MiB") == 512 << 20
    assert parse_size("1.5k") == 1500
    assert [human(n) for n in (0, 999, 1000, 12_345_678, 2e12)] == ["0 B", "999 B", "1.0 kB", "12.3 MB", "2.0 TB"]
    assert [count(n) for n in (12, 134_515_008, 7e9)] == ["12", "134.5M", "7B"]


def test_no_message_holds_control_characters(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "\\u001b[31mred"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    output = run("inspect", tmp_path).output
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", output)


def test_no_sync_waits_for_no_disk(tmp_path, monkeypatch):
    """Every command that writes weights has the flag; the output is the same."""
    calls = []
    for name in ("fsync", "fdatasync"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda fd, real=real: (calls.append(fd), real(fd))[1])
    good("convert", META, tmp_path / "synced", "--to", "hf")
    assert calls
    calls.clear()
    model, recipe = tmp_path / "model", tmp_path / "soup.json"
    good("convert", META, model, "--to", "hf", "--no-sync")
    written = {p.name: p.read_bytes() for p in model.iterdir() if p.suffix == ".safetensors"}
    assert written == {name: (tmp_path / "synced" / name).read_bytes() for name in written} != {}
    recipe.write_text(
        json.dumps({"merge_method": "linear", "models": [{"model": str(model), "parameters": {"weight": 1}}]})
    )
    good("soup", recipe, tmp_path / "merged", "--no-sync")
    good("upcycle", model, tmp_path / "moe", "--experts", 2, "--top-k", 1, "--no-sync", "--verify-tokens", 8)
    assert not calls

"""Choosing models and weights by a held-out loss, and experts that stand in another order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import surgery
from surgery.cli import main as cli
from surgery.errors import ConfigError, FileError, LayoutError
from surgery.formats.registry import open_checkpoint
from surgery.merging import search
from surgery.merging.align_experts import similarity
from surgery.merging.request import Choosing, Soup
from surgery.merging.run import read
from surgery.running.loss import loss_of
from tests import merges, oracle, tiny
from tests.test_conversion import weights
from tests.test_soup_tokenizers import COMMON, tokenizer


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A model that has learnt a text, two copies with a little noise, and one with a lot."""
    folder = tmp_path_factory.mktemp("runs")
    base = folder / "base"
    count = tokenizer("a", base)
    text = folder / "text.txt"
    text.write_text(" ".join(COMMON[i * i % 40] for i in range(300)))
    tiny.save("llama", base, **{**merges.SMALL, "l": 2, "v": count})
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()
    ids = torch.tensor([AutoTokenizer.from_pretrained(base).encode(text.read_text())[:128]])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    names = []
    for i, noise in enumerate((0.02, 0.02, 0.3)):
        out = folder / f"run-{i}"
        tokenizer("a", out)
        model.save_pretrained(out)
        merges.disturb(out, i, noise)
        names.append(str(out))
    return names, text


def loss_by_hand(folder, text, count):
    """transformers' own loss on the first window."""
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder).encode(text.read_text())[:count]])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def config_of(names):
    return {"merge_method": "linear", "models": [{"model": n, "parameters": {"weight": 1}} for n in names]}


def test_the_loss_is_transformers(runs):
    names, text = runs
    assert loss_of(Path(names[0]), text, 100, "cpu") == pytest.approx(loss_by_hand(names[0], text, 100), rel=1e-5)


def command(tmp_path, config, text, *flags):
    path = tmp_path / "soup.yaml"
    path.write_text(yaml.safe_dump(config))
    arguments = ["soup", str(path), str(tmp_path / "out"), "--eval", str(text), "--eval-tokens", "100", "--json"]
    return CliRunner().invoke(cli.main, [*arguments, "--device", "cpu", *flags])


def test_greedy_leaves_out_what_harms(runs, tmp_path):
    """The noisy run is the last tried and is not kept; the log makes a second run free."""
    names, text = runs
    done = command(tmp_path, config_of(names), text, "--greedy")
    assert done.exit_code == 0, done.output
    assert "lower than the best single model" in done.stderr
    tried = json.loads(done.stdout)["tried"]
    losses = {tuple(t["weights"]): t["loss"] for t in tried["tried"]}
    single = {n: losses[n,] for n in names}
    assert single == {n: pytest.approx(loss_by_hand(n, text, 100), rel=1e-5) for n in names}
    assert losses[names[0], names[1]] < min(single.values())
    assert losses[tuple(names)] > losses[names[0], names[1]]
    kept = surgery.soup(config_of(names[:2]), tmp_path / "two")
    assert json.loads(done.stdout)["content_digest"] == kept.content_digest
    assert loss_by_hand(tmp_path / "out", text, 100) == pytest.approx(losses[names[0], names[1]], rel=1e-5)
    assert tried["measured_now"] == len(losses) == 5
    again = command(tmp_path, config_of(names), text, "--greedy", "--force")
    assert json.loads(again.stdout)["tried"]["measured_now"] == 0
    assert json.loads(again.stdout)["content_digest"] == kept.content_digest
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_search_goes_on_where_it_was(runs, tmp_path):
    names, text = runs
    log = tmp_path / "tried.jsonl"
    more = ["--log", str(log)]
    done = command(tmp_path, config_of(names), text, "--search", "4", *more)
    assert done.exit_code == 0, done.output
    first = json.loads(done.stdout)
    losses = [t["loss"] for t in first["tried"]["tried"]]
    assert loss_by_hand(tmp_path / "out", text, 100) == pytest.approx(min(losses[3:]), rel=1e-4)
    lines = log.read_text().splitlines()
    log.write_text("\n".join(lines[:4]) + '\n{"weights": {"half a li')  # stopped while it wrote
    again = json.loads(command(tmp_path, config_of(names), text, "--search", "4", "--force", *more).stdout)
    assert again["content_digest"] == first["content_digest"]
    assert 0 < again["tried"]["measured_now"] < first["tried"]["measured_now"]
    other = command(tmp_path, config_of(names[:2]), text, "--greedy", "--force", *more)
    assert other.exit_code == 1
    assert "log of another search" in other.output


def test_what_cannot_be_chosen_is_told(runs, tmp_path):
    names, text = runs

    def tried(config, prose=text):
        return search.Tried(
            read(config), Soup(), Choosing(greedy=True, text=prose, tokens=100, device="cpu"), tmp_path / "log", print
        )

    slices = [{"sources": [{"model": names[0], "layer_range": [0, 2], "parameters": {"weight": 1}}]}]
    with pytest.raises(ConfigError, match="slices"):
        tried({"merge_method": "linear", "slices": slices})
    with pytest.raises(ConfigError, match="no weights"):
        tried({"merge_method": "karcher", "models": [{"model": n} for n in names]})
    with pytest.raises(FileError, match="is no file"):
        tried(config_of(names), tmp_path / "none.txt")
    gradient = config_of(names)
    gradient["models"][0]["parameters"]["weight"] = [0, 1]
    with pytest.raises(ConfigError, match="only numbers"):
        search.greedy(tried(gradient))


# experts


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    """A mixture of experts and the same with its experts in another order in every layer."""
    folder = tmp_path_factory.mktemp("mixtures")
    (model,) = merges.models("mixtral", folder, 1, "float32")
    shuffled = tiny.save("mixtral", folder / "shuffled", "float32", **{**merges.SMALL, **tiny.WIDER, "h": 52})
    tensors = load_file(shuffled / "model.safetensors")
    orders = {0: [2, 0, 3, 1], 1: [1, 3, 2, 0]}
    out = dict(tensors)
    for name, t in tensors.items():
        layer = int(name.split(".")[2]) if ".layers." in name else -1
        if ".experts." in name:
            place = int(name.split(".experts.")[1].split(".")[0])
            out[name] = tensors[name.replace(f".experts.{place}.", f".experts.{orders[layer][place]}.")]
        elif "moe.gate" in name:
            out[name] = t[orders[layer]]
    save_file({k: t.clone() for k, t in out.items()}, shuffled / "model.safetensors", {"format": "pt"})
    return model, str(shuffled), orders


def test_permuted_experts_are_found(mixtures, tmp_path):
    """A shuffled mixture computes the same; its aligned soup with the original is the original, unaligned it is not."""
    model, shuffled, orders = mixtures
    ids = torch.randint(0, 72, (1, 20), generator=torch.Generator().manual_seed(3))
    assert torch.allclose(oracle.hf_logits(Path(model), ids), oracle.hf_logits(Path(shuffled), ids), atol=1e-4)
    report = surgery.soup({**config_of([model, shuffled]), "align": "experts"}, tmp_path / "aligned")
    ours, original = weights(tmp_path / "aligned"), weights(Path(model))
    assert all(torch.equal(ours[k], original[k]) for k in original)
    assert any("2 of 2 layers were reordered" in note and "-> 1.000" in note for note in report.notes)
    surgery.soup(config_of([model, shuffled]), tmp_path / "plain")
    plain = weights(tmp_path / "plain")
    assert not all(torch.allclose(plain[k], original[k], atol=1e-3) for k in original)
    scores = similarity(open_checkpoint(model), open_checkpoint(shuffled), 1)
    assert scores.argmax(1).tolist() == [orders[1].index(i) for i in range(4)]
    assert torch.allclose(scores.max(1).values, torch.ones(4, dtype=torch.float64), atol=1e-6)


def test_alignment_survives_noise_and_base_models(mixtures, tmp_path):
    """The noisy shuffled copy merged by task arithmetic equals the noisy copy in order."""
    model, _, orders = mixtures
    noisy = Path(tiny.save("mixtral", tmp_path / "noisy", "float32", **{**merges.SMALL, **tiny.WIDER, "h": 52}))
    merges.disturb(noisy, 4, 0.02)
    tensors, turned = load_file(noisy / "model.safetensors"), {}
    for name, t in tensors.items():
        layer = int(name.split(".")[2]) if ".layers." in name else -1
        turned[name] = t[orders[layer]].clone() if "moe.gate" in name else t
        if ".experts." in name:
            place = int(name.split(".experts.")[1].split(".")[0])
            turned[name] = tensors[name.replace(f".experts.{place}.", f".experts.{orders[layer][place]}.")].clone()
    other = Path(tiny.save("mixtral", tmp_path / "other", "float32", **{**merges.SMALL, **tiny.WIDER, "h": 52}))
    save_file(turned, other / "model.safetensors", {"format": "pt"})

    def config(name):
        return {"merge_method": "task_arithmetic", "base_model": model,
                "models": [{"model": str(name), "parameters": {"weight": 0.5}}]}  # fmt: skip

    plain = surgery.soup(config(noisy), tmp_path / "plain")
    aligned = surgery.soup({**config(other), "align": "experts"}, tmp_path / "aligned")
    assert plain.content_digest == aligned.content_digest


def test_alignment_needs_equal_experts(mixtures, tmp_path):
    model, shuffled, _ = mixtures
    few = tiny.save("mixtral", tmp_path / "few", **{**merges.SMALL, **tiny.WIDER, "h": 52, "e": 5})
    with pytest.raises(LayoutError, match="of 5 experts"):
        surgery.soup({**config_of([model, str(few)]), "align": "experts"}, tmp_path / "no")
    slices = [{"sources": [{"model": model, "layer_range": [0, 1], "parameters": {"weight": 1}},
                           {"model": shuffled, "layer_range": [1, 2], "parameters": {"weight": 1}}]}]  # fmt: skip
    with pytest.raises(ConfigError, match="the same layers"):
        surgery.soup({"merge_method": "linear", "slices": slices, "align": "experts"}, tmp_path / "no")

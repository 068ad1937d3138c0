"""Meta's format against files that Meta's own code wrote, and their logits."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch

import surgery
from surgery.containers import open_file
from surgery.errors import ConfigError, FileError, LayoutError, SurgeryError, UsageError
from surgery.formats.base import Checkpoint
from surgery.formats.hf import config as hf_config
from surgery.formats.meta import config as meta_params
from surgery.formats.meta import table as meta_table
from surgery.formats.registry import open_checkpoint
from surgery.formats.table import Table
from surgery.formats.topology import Rank, Topology
from surgery.formats.weave import gather
from surgery.tensors.extent import look_equal
from surgery.tensors.lazy import Fill
from tests import oracle, reference
from tests.test_hf import mutants

CASES = ("llama2-gqa-mp2", "llama2-mp1-legacyser", "llama31-mp2", "llama32-tied-mp1")


def read(name: str) -> Checkpoint:
    return open_checkpoint(oracle.GOLDEN / "meta" / name / "checkpoint", options=options(name))


def options(name: str) -> dict[str, str]:
    return {"rope_factor": "8"} if "tied" in name else {}  # the reference code computes with 8, releases need 32


@pytest.mark.parametrize("name", CASES)
def test_parts_compute_upstreams_logits(name):
    ids, want = oracle.expected(f"meta/{name}")
    assert oracle.gap(reference.logits(read(name), ids), want) < 2e-5


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_gives_upstreams_files(name, tmp_path):
    source = oracle.GOLDEN / "meta" / name / "checkpoint"
    there = surgery.convert(source, tmp_path / "hf", to="hf", options=options(name))
    ids, want = oracle.expected(f"meta/{name}")
    assert oracle.gap(oracle.hf_logits(tmp_path / "hf", ids), want) < 2e-5
    ranks = len(list(source.glob("*.pth")))
    back = surgery.convert(tmp_path / "hf", tmp_path / "back", to="meta", topology=Topology(tp=ranks))
    assert back.content_digest == there.content_digest
    for path in source.glob("*.pth"):
        ours, theirs = oracle.torch_tensors(tmp_path / "back" / path.name), oracle.torch_tensors(path)
        theirs = {k: t for k, t in theirs.items() if not k.endswith("rope.freqs")}
        assert ours.keys() == theirs.keys()
        assert all(oracle.same_bits(ours[k], theirs[k]) for k in theirs)
    params, again = (json.loads((p / "params.json").read_text()) for p in (source, tmp_path / "back"))
    for key in ("dim", "n_layers", "n_heads", "norm_eps"):
        assert again[key] == params[key]
    assert meta_params.ffn_width(
        again["dim"], again["multiple_of"], again.get("ffn_dim_multiplier")
    ) == meta_params.ffn_width(params["dim"], params["multiple_of"], params.get("ffn_dim_multiplier"))


# llama31-mp2 has two key/value heads on each rank: with one, moving that axis changes nothing and goes unseen.
@pytest.mark.parametrize(("name", "least"), [("llama31-mp2", 30), ("llama2-gqa-mp2", 3)])
def test_a_mistake_in_any_row_shows(name, least):
    checkpoint = read(name)
    ids, want = oracle.expected(f"meta/{name}")
    embedding = "vocab" if name == "llama31-mp2" else "width"
    folder = oracle.GOLDEN / "meta" / name / "checkpoint"
    shards = {Rank(tp=i): open_file(p).tensors for i, p in enumerate(sorted(folder.glob("*.pth")))}
    table = meta_table.table(embedding)
    tried = 0
    for row in table.rows:
        if next(row.binds(checkpoint.spec), None) is None or row.copy:
            continue
        if embedding == "width" and row.name != "tok_embeddings.weight":
            continue
        cuts = [dataclasses.replace(row, cut=c) for c in ("", "h", "v", "f", "g") if c != row.cut]
        for mutant in [*mutants(row), *cuts]:
            tried += 1
            rows = tuple(mutant if r is row else r for r in table.rows)
            try:
                parts = gather(Table("meta", rows, meta_table.IGNORED), shards, checkpoint.spec, Topology(tp=2)).parts
                wrong = dataclasses.replace(checkpoint, parts=parts)
                assert oracle.gap(reference.logits(wrong, ids), want) > 1e-3, f"{row.name} as {mutant}"
            except (SurgeryError, ValueError):
                continue
    assert tried >= least


def test_any_ranks_to_any_ranks(tmp_path):
    source = oracle.GOLDEN / "meta" / "llama31-mp2" / "checkpoint"
    digests, at = set(), source
    for ranks in (4, 1, 2):
        report = surgery.convert(at, tmp_path / str(ranks), to="meta", topology=Topology(tp=ranks))
        digests.add(report.content_digest)
        at = tmp_path / str(ranks)
    assert len(digests) == 1
    for path in source.glob("*.pth"):
        ours, theirs = oracle.torch_tensors(at / path.name), oracle.torch_tensors(path)
        assert ours.keys() == theirs.keys()
        assert all(oracle.same_bits(ours[k], theirs[k]) for k in theirs)


def test_key_value_heads_that_cannot_be_shared_are_refused(tmp_path):
    source = oracle.GOLDEN / "meta" / "llama31-mp2" / "checkpoint"
    with pytest.raises(LayoutError, match=r"cannot divide 4 key/value heads .* among 3 ranks"):
        surgery.convert(source, tmp_path / "x", to="meta", topology=Topology(tp=3))
    assert not list(tmp_path.iterdir())


def test_shared_and_strided_storages(tmp_path):
    """Releases hold all tensors of a layer as views of one storage; w2 may even be stored transposed."""
    source = oracle.GOLDEN / "meta" / "llama2-mp1-legacyser" / "checkpoint"
    state = torch.load(source / "consolidated.00.pth", weights_only=True)
    storage = torch.cat([t.reshape(-1) for t in state.values()])
    views, at = {}, 0
    for name, t in state.items():
        views[name] = storage[at : at + t.numel()].view(t.shape)
        at += t.numel()
    for name in [n for n in views if n.endswith("w2.weight")]:
        views[name] = views[name].t().contiguous().t()
    folder = tmp_path / "release"
    shutil.copytree(source, folder)
    torch.save(views, folder / "consolidated.00.pth")
    ours, theirs = open_checkpoint(folder), open_checkpoint(source)
    assert all(oracle.same_bits(ours.parts[n].full(), theirs.parts[n].full()) for n in theirs.parts)
    read_now = ours.parts["layers.1.mlp.down"][3:9, 5:70]
    assert oracle.same_bits(read_now, theirs.parts["layers.1.mlp.down"].full()[3:9, 5:70])


def test_unequal_copies_of_a_norm_are_refused(tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(oracle.GOLDEN / "meta" / "llama31-mp2" / "checkpoint", folder)
    state = torch.load(folder / "consolidated.01.pth", weights_only=True)
    state["layers.1.ffn_norm.weight"] += 0.5
    torch.save(state, folder / "consolidated.01.pth")
    with pytest.raises(LayoutError, match=r"layers.1.ffn_norm.weight should be the same on every rank"):
        surgery.convert(folder, tmp_path / "hf", to="hf")
    assert not (tmp_path / "hf").exists()


def test_a_head_that_only_looks_tied_is_refused(tmp_path):
    folder = tmp_path / "almost"
    shutil.copytree(oracle.GOLDEN / "meta" / "llama32-tied-mp1" / "checkpoint", folder)
    state = torch.load(folder / "consolidated.00.pth", weights_only=True)
    state["output.weight"] = state["output.weight"].clone()
    state["output.weight"][7] += 1  # none of the rows that are looked at when the checkpoint is opened
    torch.save(state, folder / "consolidated.00.pth")
    with pytest.raises(LayoutError, match="embed should be the same"):
        surgery.convert(folder, tmp_path / "hf", to="hf")


def test_a_missing_rank_is_named(tmp_path):
    folder = tmp_path / "gap"
    shutil.copytree(oracle.GOLDEN / "meta" / "llama31-mp2" / "checkpoint", folder)
    (folder / "consolidated.00.pth").unlink()
    with pytest.raises(FileError, match=r"consolidated.00.pth is missing"):
        open_checkpoint(folder)
    shutil.copy(folder / "consolidated.01.pth", folder / "consolidated.00.pth")
    (folder / "consolidated.01.pth").unlink()
    with pytest.raises(ConfigError, match="vocab_size is 576, but the embedding has 288 rows"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dim": "big"}, "dim is 'big'"),
        ({"n_heads": 7}, "do not fit together"),
        ({"vocab_size": 99}, "vocab_size is 99"),
        ({"use_scaled_rope": 1}, "use_scaled_rope is 1"),
        ({"rope_theta": -1}, "rope_theta is -1"),
    ],
)
def test_senseless_params_are_refused(change, text):
    params = json.loads((oracle.GOLDEN / "meta" / "llama31-mp2" / "checkpoint" / "params.json").read_text())
    with pytest.raises(ConfigError, match=text):
        meta_params.read_params({**params, **change}, "params.json", meta_params.Evidence(576, 448, "vocab", False))


def test_guesses_are_named():
    notes = " ".join(read("llama2-gqa-mp2").notes)
    assert "rope_theta: 10000" in notes
    assert "longest context: 4096" in notes
    tied = open_checkpoint(oracle.GOLDEN / "meta" / "llama32-tied-mp1" / "checkpoint")
    assert tied.spec.rope.scaling["factor"] == 32
    assert any("factor: 32" in n for n in tied.notes)


def test_the_window_of_a_mistral_is_read(tmp_path):
    folder = tmp_path / "mistral"
    shutil.copytree(oracle.GOLDEN / "meta" / "llama2-gqa-mp2" / "checkpoint", folder)
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({**params, "sliding_window": 5}))
    found = open_checkpoint(folder)
    assert any("sees 5 with itself" in note for note in found.notes)
    surgery.convert(folder, tmp_path / "hf", to="hf")
    surgery.convert(oracle.GOLDEN / "meta" / "llama2-gqa-mp2" / "checkpoint", tmp_path / "whole", to="hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["model_type"], config["sliding_window"], config["max_position_embeddings"]) == ("mistral", 5, 32768)
    ids, _ = oracle.expected("meta/llama2-gqa-mp2")
    seen, all_seen = (oracle.hf_logits(tmp_path / name, ids) for name in ("hf", "whole"))
    assert oracle.gap(seen[:, :5], all_seen[:, :5]) < 1e-4
    assert oracle.gap(seen[:, 5:], all_seen[:, 5:]) > 0.01
    with pytest.raises(ConfigError, match="sliding window: 5 in"):
        surgery.convert(folder, tmp_path / "meta", to="meta")


def test_ffn_numbers_of_the_releases():
    for dim, width in ((4096, 11008), (8192, 28672), (4096, 14336), (2048, 8192), (3072, 8192), (576, 1536), (40, 97)):
        multiple, multiplier = meta_params.ffn_numbers(dim, width)
        assert meta_params.ffn_width(dim, multiple, multiplier) == width


@pytest.mark.parametrize(
    "family", [f for f in hf_config.FAMILIES if f not in ("llama", "mistral", "flex_olmo", "attention_moe")]
)
def test_what_metas_code_cannot_compute_is_refused(family, tiny_hf, tmp_path):
    with pytest.raises(ConfigError, match="Meta's format cannot hold"):
        surgery.convert(tiny_hf(family), tmp_path / "out", to="meta")
    assert not list(tmp_path.iterdir())


def test_options_that_do_not_apply_are_errors(tmp_path):
    source = oracle.GOLDEN / "meta" / "llama2-gqa-mp2" / "checkpoint"
    with pytest.raises(UsageError, match="option qkv"):
        surgery.convert(source, tmp_path / "x", to="hf", options={"qkv": "A"})
    with pytest.raises(UsageError, match="takes auto, vocab, width"):
        surgery.convert(source, tmp_path / "x", to="meta", options={"embedding": "sideways"})
    with pytest.raises(UsageError, match="no --pp 2"):
        surgery.convert(source, tmp_path / "x", to="meta", topology=Topology(pp=2))
    with pytest.raises(ConfigError, match="does not scale the rope"):
        surgery.convert(source, tmp_path / "x", to="hf", options={"rope_factor": "8"})


def test_look_equal_reads_little():
    checkpoint = read("llama31-mp2")
    assert not look_equal(checkpoint.parts["embed"], Fill((4, 4), "bfloat16"))

"""Which experts stay, by flags and recipes, layer by layer: against a naive loop over the parts, and the logits."""

from __future__ import annotations

import json
import re

import pytest
import torch
from click.testing import CliRunner

from surgery.cli import main as cli
from surgery.errors import ConfigError, UsageError
from surgery.formats.registry import open_checkpoint
from surgery.formats.topology import Topology
from surgery.upcycling import run as running
from surgery.upcycling.edit_experts.choose import chosen
from surgery.upcycling.edit_experts.experts import router_classes
from surgery.upcycling.edit_experts.selection import HOWS, Choice, from_flags, from_recipe, unfolded
from surgery.upcycling.request import Edit
from tests import oracle, reference, tiny

IDS = torch.randint(0, tiny.SIZES["v"], (2, 24), generator=torch.Generator().manual_seed(3))


def weights(folder):
    from safetensors.torch import load_file

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def experts(src, dst, to="hf", topology=None, verify_tokens=32, **flags):
    """Change the experts of a folder, whatever that costs."""
    values = unfolded({k: (v,) if k in HOWS and isinstance(v, str) else v for k, v in flags.items()})
    request = Edit(**values, force_lossy=True, to=to, topology=topology or Topology(), verify_tokens=verify_tokens)
    return running.carry_out(running.prepare_edit(src, request), dst)


def naive(parts, groups_of_layer):
    """New parts from old ones by plain loops; groups_of_layer[layer] lists the old experts of every new one."""
    out = {n: t for n, t in parts.items() if ".experts." not in n and ".router" not in n}
    for layer, groups in groups_of_layer.items():
        for name in (f"layers.{layer}.router", f"layers.{layer}.router.bias"):
            if name in parts:
                rows = [torch.stack([parts[name][i].double() for i in g]).mean(0) for g in groups]
                out[name] = torch.stack(rows).to(parts[name].dtype)
        for new, group in enumerate(groups):
            for x in ("gate", "up", "down"):
                olds = [parts[f"layers.{layer}.experts.{i}.{x}"].double() for i in group]
                out[f"layers.{layer}.experts.{new}.{x}"] = (sum(olds) / len(olds)).to(parts["embed"].dtype)
    return out


def same_parts(checkpoint, want):
    assert checkpoint.parts.keys() == want.keys()
    for name, part in checkpoint.parts.items():
        got = part.full()
        assert got.shape == want[name].shape, name
        torch.testing.assert_close(got, want[name], rtol=1e-6, atol=1e-7, msg=name)


CASES = {
    "keep": ({"keep": ("6,0-3",)}, [(6,), (0,), (1,), (2,), (3,)]),
    "prune": ({"prune": ("0,5-6",)}, [(1,), (2,), (3,), (4,), (7,)]),
    "permute": ({"permute": ("3,1,0,2,7,6,5,4",)}, [(3,), (1,), (0,), (2,), (7,), (6,), (5,), (4,)]),
    "merge": ({"merge": ("5+1+7,3,0+2",)}, [(5, 1, 7), (3,), (0, 2)]),
    "duplicate": ({"duplicate": 2}, [(i // 2,) for i in range(16)]),
}


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "glm4_moe", "granitemoeshared"])
@pytest.mark.parametrize("case", CASES)
def test_against_a_plain_loop(case, family, tiny_hf):
    source = open_checkpoint(tiny_hf(family))
    flags, groups = CASES[case]
    made = chosen(source, from_flags({**flags, "force_lossy": True}))
    moe = [i for i in range(source.spec.layers) if source.spec.is_moe(i)]
    parts = {name: part.full() for name, part in source.parts.items()}
    same_parts(made.checkpoint, naive(parts, dict.fromkeys(moe, groups)))
    assert made.checkpoint.spec.experts == len(groups)
    assert (not made.losses) == (case in ("permute", "duplicate"))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "olmoe", "glm4_moe", "ernie4_5_moe"])
@pytest.mark.parametrize("case", ["permute", "duplicate"])
def test_what_keeps_the_function_keeps_the_logits(case, family, tiny_hf, tmp_path):
    done = experts(tiny_hf(family), tmp_path / "out", verify_tokens=32, **CASES[case][0])
    before, after = (oracle.hf_logits(folder, IDS) for folder in (tiny_hf(family), tmp_path / "out"))
    assert (before - after).abs().max() < 1e-4
    assert done.proof.verdict == "exact"
    record = json.loads((tmp_path / "out" / "surgery.json").read_text())
    assert record["upcycling"]["exact"] is True
    assert record["proof"]["fp32"]["max_diff"] < 1e-4
    assert record["source_digest"] != record["content_digest"]


def test_pruned_models_load_in_transformers_and_compute_what_they_should(tiny_hf, tmp_path):
    done = experts(tiny_hf("mixtral"), tmp_path / "out", keep=("0-3", "2:4-7", "4-5:1,3,5,7"), top_k=2)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (4, 2)
    assert done.proof.verdict == "not preserving, as asked"
    source = open_checkpoint(tiny_hf("mixtral"))
    kept = {0: range(4), 1: range(4), 2: range(4, 8), 3: range(4), 4: (1, 3, 5, 7), 5: (1, 3, 5, 7)}
    parts = naive({n: p.full() for n, p in source.parts.items()}, {i: [(e,) for e in es] for i, es in kept.items()})
    made = open_checkpoint(tmp_path / "out")
    same_parts(made, parts)
    assert (reference.logits(made, IDS) - oracle.hf_logits(tmp_path / "out", IDS)).abs().max() < 1e-4


def test_any_format_to_any(tiny_hf, tmp_path):
    experts(tiny_hf("mixtral"), tmp_path / "there", to="megatron-dist", topology=Topology(ep=2), prune="1,3")
    experts(tmp_path / "there", tmp_path / "back", permute="5,4,3,2,1,0")
    experts(tiny_hf("mixtral"), tmp_path / "direct", permute="7,6,5,3,4,2,1,0")
    experts(tmp_path / "direct", tmp_path / "kept", keep="0-2,4,5,7")
    ours, theirs = weights(tmp_path / "back"), weights(tmp_path / "kept")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():  # Megatron pads the vocabulary
        assert oracle.same_bits(ours[name][: len(tensor)], tensor), name


@pytest.mark.parametrize(("by", "which"), [("router-norm", "router"), ("weight-norm", "experts")])
def test_pruning_keeps_the_largest(by, which, tiny_hf):
    source = open_checkpoint(tiny_hf("qwen3_moe"))
    made = chosen(source, from_flags({"best": ("3",), "by": by, "force_lossy": True}))
    layers = {int(i): tuple((int(n),) for n in names) for i, names in made.details["layers"].items()}
    for layer, groups in layers.items():
        if which == "router":
            norms = source.parts[f"layers.{layer}.router"].full().norm(dim=1)
        else:
            norms = torch.tensor(
                [
                    sum(
                        source.parts[f"layers.{layer}.experts.{e}.{x}"].full().pow(2).sum()
                        for x in ("gate", "up", "down")
                    )
                    for e in range(8)
                ]
            )
        assert groups == tuple((int(i),) for i in sorted(norms.topk(3).indices))
    assert 0 not in layers  # a dense layer


def grouped(folder, tmp_path):
    """A dense model upcycled into 4 groups of 2 shards."""
    import surgery

    surgery.upcycle(folder, tmp_path / "grouped", experts=8, top_k=4, granularity=2, verify_tokens=0)
    return tmp_path / "grouped"


def test_virtual_groups_are_not_broken_in_silence(tiny_hf, tmp_path):
    folder = grouped(tiny_hf("llama"), tmp_path)
    source = open_checkpoint(folder)
    assert router_classes(source, 0) == [0, 0, 2, 2, 4, 4, 6, 6]
    for flags, words in (
        ({"keep": ("0-4",)}, "incomplete"),
        ({"prune": ("1,2",)}, "incomplete"),
        ({"top_k": 3}, "no whole virtual groups"),
        ({"duplicate": 2, "top_k": 2}, "no whole virtual groups"),
        ({"merge": ("0+2,1,3-7",)}, "incomplete"),
        ({"best": ("5",)}, "part of a virtual group"),
    ):
        with pytest.raises(UsageError, match=words):
            chosen(source, from_flags(flags))
    forced = chosen(source, from_flags({"keep": ("0-4",), "force_lossy": True}))
    assert any("incomplete" in why for why in forced.losses)
    for flags in ({"keep": ("2-5",)}, {"best": ("4",)}, {"merge": ("0+2,1+3,4-7",)}, {"duplicate": 3}, {"top_k": 2}):
        losses = chosen(source, from_flags({**flags, "force_lossy": True})).losses
        assert not any("virtual" in why for why in losses), flags
    experts(folder, tmp_path / "fewer", keep="2-5", verify_tokens=0)
    before, after = (oracle.hf_logits(f, IDS) for f in (tiny_hf("llama"), tmp_path / "fewer"))
    assert (before - after).abs().max() < 1e-4  # every group is the whole mlp


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({}, "nothing is asked"),
        ({"keep": ("8",)}, "no expert 8 in layer 0"),
        ({"keep": ("1,1",)}, "names an expert twice"),
        ({"keep": ("0+1",)}, "only merge"),
        ({"keep": ("3-1",)}, "no list of numbers"),
        ({"keep": ("0-3",), "prune": ("1",)}, "both for all layers"),
        ({"keep": ("1:0-3", "0-2:0-3")}, "told two things"),
        ({"keep": ("1:0-3",), "force_lossy": True}, "layer 0 would have 8 experts and layer 1 4"),
        ({"keep": ("99:0-3",)}, "layer 99 has no experts"),
        ({"permute": ("1,0",)}, "does not say where"),
        ({"keep": ("0,1",), "top_k": 3}, "only 2 experts are left"),
        ({"best": ("9",)}, "there are 8 experts"),
        ({"best": ("x",)}, "no number of experts"),
        ({"best": ("4",), "by": "luck"}, "unknown"),
    ],
)
def test_refusals(flags, words, tiny_hf):
    with pytest.raises(UsageError, match=re.escape(words)):
        chosen(open_checkpoint(tiny_hf("mixtral")), from_flags(flags))


def test_a_dense_model_is_refused(tiny_hf):
    with pytest.raises(ConfigError, match="has no experts"):
        chosen(open_checkpoint(tiny_hf("llama")), from_flags({"top_k": 1}))


def test_recipes_say_the_same_as_flags(tmp_path):
    recipe = {"keep": [0, 1], "layers": {"3-4": {"merge": [[0, 1], [2, 3]]}, 5: {"best": 2}}, "top-k": 2}
    flags = {"keep": ("0,1",), "merge": ("3-4:0+1,2+3",), "best": ("5:2",), "top_k": 2}
    assert from_recipe(recipe, "r.yaml") == from_flags(flags)
    assert from_recipe(recipe, "r.yaml").for_layer(4) == Choice("merge", ((0, 1), (2, 3)))
    for bad, words in (
        ({"kep": [0]}, "did you mean keep"),
        ({"keep": [0], "layers": [1]}, "layers maps"),
        ({"layers": {1: {"keep": [0], "prune": [1]}}}, "one choice"),
        ({"keep": ["x"]}, "no list of numbers"),
        ({"top_k": "2"}, "--top-k '2' is not a whole number"),
        ({"duplicate": True}, "--duplicate True is not a whole number"),
        ([1], "no recipe"),
    ):
        with pytest.raises(ConfigError, match=words) as error:
            from_recipe(bad, "r.yaml")
        assert str(error.value).startswith("r.yaml: ")


def test_the_command(tiny_hf, tmp_path):
    (tmp_path / "r.yaml").write_text("merge: [[0, 1], [2, 3]]\ntop_k: 2\nforce_lossy: true\n")

    def run(*words):
        return CliRunner().invoke(cli.main, ["experts", str(tiny_hf("mixtral")), str(tmp_path / "out"), *words])

    planned = json.loads(run("--recipe", str(tmp_path / "r.yaml"), "--dry-run", "--json").output)
    assert planned["upcycling"]["experts"] == 2
    done = run("--recipe", str(tmp_path / "r.yaml"), "--verify-tokens", "32")
    assert done.exit_code == 0, done.output
    assert "not preserving, as asked" in done.output
    assert open_checkpoint(tmp_path / "out").spec.experts == 2
    words = ("--keep", "3:0,2", "--top-k", "1", "--recipe", str(tmp_path / "r.yaml"), "--dry-run", "--json")
    both = json.loads(run(*words).output)["upcycling"]  # flags win
    assert both["top_k"] == 1
    assert both["layers"]["3"] == ["0", "2"]
    assert both["layers"]["2"] == ["0+1", "2+3"]

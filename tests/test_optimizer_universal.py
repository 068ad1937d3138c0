"""Adam's state as DeepSpeed's universal checkpoints: whole tensors, of which every rank takes what it holds.

What a rank takes is worked out here as DeepSpeed's `load_hp_checkpoint_state` does it (`taken`), and must round to the
weights in that rank's own file; with DeepSpeed at hand, its own code is asked as well.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.errors import ConfigError, LayoutError, SurgeryError
from surgery.formats.neox.universal import share
from surgery.formats.optimizer import MOMENTS
from surgery.formats.topology import Topology
from surgery.tensors.in_memory import InMemory
from tests import tiny
from tests.oracle import same_bits
from tests.test_optimizer import GOLDEN, RANK, Attack, copied, equal, opened, trees_without_deepspeed, values

CLASS = "deepspeed.checkpoint.universal_checkpoint.SubparamShape"


@dataclass
class SubparamShape:
    """DeepSpeed's class of this name."""

    patterns: list
    shape: tuple
    partition_dim: int


def tree(path: Path):
    with torch.serialization.safe_globals([(SubparamShape, CLASS)]):
        return torch.load(path, weights_only=True)


def taken(found: dict, shape: torch.Size, rank: int, ranks: int) -> torch.Tensor:
    """What DeepSpeed gives to a rank of the tensor in a file."""
    whole = found["param"]
    if whole.shape == shape:
        return whole
    if found.get("vocab_tensor"):
        whole = torch.nn.functional.pad(whole, (0, 0, 0, shape[0] * ranks - len(whole)))
    dim, blocks = found.get("cat_dim", 0), whole.chunk(found.get("param_n_sub_params", 1), found.get("cat_dim", 0))
    if known := found.get("sub_param_shape"):
        dim = known.partition_dim
        blocks = whole.split(known.shape[dim], dim)
    return torch.cat([block.chunk(ranks, dim)[rank] for block in blocks], dim).reshape(shape)


def written(folder: Path, tp: int = 1, pp: int = 0, case: str = "neox-zero1", release: str = "2024-11", **more) -> Path:
    """A golden as a universal checkpoint."""
    surgery.convert(GOLDEN / case, folder / "m", to="neox", optimizer=True, options={"release": release},
                    topology=Topology(tp=tp, pp=pp), **more)  # fmt: skip
    return folder / "m"


def zero_of(folder: Path) -> Path:
    return folder / (folder / "latest_universal").read_text() / "zero"


def module_of(folder: Path, rank: int) -> dict[str, torch.Tensor]:
    """The weights in a rank's own files, under their names in the model."""
    home = zero_of(folder).parent
    found = tree(home / f"mp_rank_{rank:02d}_model_states.pt")["module"]
    if found is not None:
        return found
    layers = sorted(home.glob(f"layer_*-model_{rank:02d}-model_states.pt"))
    return {f"{int(path.name[6:8])}.{n}": t for path in layers for n, t in tree(path).items()}


@pytest.fixture(scope="module")
def universal(tmp_path_factory):
    """ZeRO's state of two ranks as DeepSpeed's universal checkpoint."""
    return written(tmp_path_factory.mktemp("universal"))


WAYS = [
    ("neox-zero1", "2024-11", 1, 0), ("neox-zero1", "2024-11", 2, 0), ("neox-zero1", "2024-11", 2, 1),
    ("hf-llama", "2024-11", 2, 0), ("hf-llama", "2024-09", 2, 1), ("hf-llama", "2024-03", 2, 0),
]  # fmt: skip


@pytest.mark.parametrize(("case", "release", "tp", "pp"), WAYS)
def test_every_rank_takes_what_it_holds(case, release, tp, pp, tmp_path):
    """By torch alone: masters that round to the rank's own weights, moments of their shape, the steps as a number."""
    folder = written(tmp_path, tp, pp, case, release)
    zero, step = zero_of(folder), opened(GOLDEN / case, case).optimizer.step
    for rank in range(tp):
        module = {n: t for n, t in module_of(folder, rank).items() if not n.endswith("inv_freq")}
        assert {p.name for p in zero.iterdir() if p.is_dir()} == module.keys()
        for name, weight in module.items():
            held = {p.stem: tree(p) for p in (zero / name).iterdir()}
            assert held.keys() == {"fp32", *MOMENTS, "step"} and held["step"] == step
            assert same_bits(taken(held["fp32"], weight.shape, rank, tp).to(weight.dtype), weight), name
            assert all(taken(held[role], weight.shape, rank, tp).shape == weight.shape for role in MOMENTS)
    scheduler = tree(zero.parent / "mp_rank_00_model_states.pt")["lr_scheduler"]
    assert scheduler["num_iters"] == step and scheduler["start_lr"] > 0
    groups = tree(zero / "optimizer_state.pt")["param_groups"]
    assert [g["step"] for g in groups] == [step, step] and groups[0]["weight_decay"] > groups[1]["weight_decay"] == 0


@pytest.mark.parametrize(("tp", "more"), [(1, {}), (2, {}), (2, {"vocab_size": 501})])
def test_whatever_the_ranks_the_state_is_the_same(tp, more, tmp_path):
    """Read back, moments and masters are the source's, at any number of ranks, and so are the files."""
    want, one = written(tmp_path / "one", **more), written(tmp_path / "tp", tp, **more)
    options = {"optimizer": "fsdp"}
    for name, folder in (("a", want), ("b", one)):
        surgery.convert(folder, tmp_path / name, to="hf", optimizer=True, options=options, **more)
    assert equal(values(opened(tmp_path / "a")), values(opened(tmp_path / "b")))
    if not more:
        assert equal(values(opened(GOLDEN / "neox-zero1", "neox-zero1")), values(opened(one)))
        files = [sorted(p for p in zero_of(folder).rglob("*") if p.is_file()) for folder in (want, one)]
        assert [p.read_bytes() for p in files[0]] == [p.read_bytes() for p in files[1]]


@pytest.mark.parametrize("counts", ["states", "groups"])
def test_what_ds_to_universal_makes_of_two_ranks_is_read(counts, tmp_path):
    """It joins the parts of ranks along rows, copies and columns too, where a run says no more (GPT-NeoX's do not).

    Apex's optimizer counts updates in its groups: then no parameter has a file that says them.
    """
    folder = copied("neox-zero1", tmp_path / "run")
    home, parts = folder / "global_step250", dict[tuple[str, str], list[torch.Tensor]]()
    want = values(opened(folder, "neox-zero1"))
    for mp in range(2):
        state = trees_without_deepspeed(folder / RANK.format(mp))["optimizer_state_dict"]
        (folder / RANK.format(mp)).unlink()
        base = state["base_optimizer_state"]
        for g, shapes in enumerate(trees_without_deepspeed(home / f"mp_rank_{mp:02d}_model_states.pt")["param_shapes"]):
            flats = {"fp32": state["single_partition_of_fp32_groups"][g], **{m: base["state"][g][m] for m in MOMENTS}}
            for stem, flat in flats.items():
                pieces = flat[: sum(map(math.prod, shapes.values()))].split([math.prod(x) for x in shapes.values()])
                for (name, shape), piece in zip(shapes.items(), pieces, strict=True):
                    parts.setdefault((name, stem), []).append(piece.reshape(tuple(shape)))
    for (name, stem), pieces in parts.items():
        (home / "zero" / name).mkdir(parents=True, exist_ok=True)
        torch.save({"param": torch.cat(pieces), "cat_dim": 0}, home / "zero" / name / f"{stem}.pt")
        if counts == "states":
            torch.save(2, home / "zero" / name / "step.pt")
    groups = [group | {"step": 2 * (counts == "groups")} for group in base["param_groups"]]
    torch.save({"param_groups": groups, "ds_version": "0.19.8"}, home / "zero" / "optimizer_state.pt")
    assert equal(values(opened(folder, "neox-zero1")), want)


BLOCKS = SubparamShape([], ((4, 2, 2), 3), 0)


@pytest.mark.parametrize(("about", "shape", "rows"), [
    ({}, (4, 3), [4, 5, 6, 7]), ({"param_n_sub_params": 2}, (4, 3), [2, 3, 6, 7]), ({"cat_dim": 1}, (8, 3), None),
    ({"sub_param_shape": BLOCKS}, (4, 3), [2, 3, 5, 7]), ({"vocab_tensor": True}, (5, 3), [5, 6, 7, -1, -1]),
])  # fmt: skip
def test_ranks_take_parts_of_blocks(about, shape, rows, tmp_path):
    """The second of two ranks; a table is filled with zeros."""
    whole = torch.arange(48.0).view(8, 6)[:, : 6 if "cat_dim" in about else 3].contiguous()
    torch.save({"param": whole, **about}, tmp_path / "x.pt")
    root = {"param": InMemory(whole), **_opened_again(about, tmp_path / "x.pt")}
    got = share(root, shape, 1, 2, tmp_path).full()
    want = whole[:, 3:] if rows is None else torch.cat([whole, torch.zeros(1, 3)])[rows]
    assert same_bits(got, want) and same_bits(got, taken({"param": whole, **about}, torch.Size(shape), 1, 2))


def _opened_again(about: dict, path: Path) -> dict:
    from surgery.containers import open_file

    return {key: value for key, value in open_file(path).root.items() if key in about}


@pytest.mark.parametrize("about", [
    {"cat_dim": 2}, {"cat_dim": -1}, {"cat_dim": "0"}, {"param_n_sub_params": 3}, {"param_n_sub_params": 0},
    {"sub_param_shape": SubparamShape([], ((4, 2, 1), 3), 0)}, {"sub_param_shape": SubparamShape([], ((5, 3), 3), 0)},
    {"sub_param_shape": SubparamShape([], (3, -1), 0)}, {"sub_param_shape": SubparamShape([], ((8,),), 0)},
])  # fmt: skip
def test_blocks_that_cannot_be_divided_are_refused(about, tmp_path):
    torch.save({"param": torch.zeros(8, 3), **about}, tmp_path / "x.pt")
    root = {"param": InMemory(torch.zeros(8, 3)), **_opened_again(about, tmp_path / "x.pt")}
    with pytest.raises(LayoutError, match="cannot divide"):
        share(root, (4, 3), 1, 2, tmp_path)


def test_shares_of_biases_are_refused_for_several_ranks(tmp_path):
    """Under a parallel residual every rank adds its own bias, and would take the whole one."""
    source = tiny.save("gpt_neox", tmp_path / "hf", l=2)
    weights = {n.replace("embed_out", "lm_head"): t for n, t in load_file(source / "model.safetensors").items()}
    group = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, "params": list(weights)}
    state = {n: {"step": torch.tensor(2.0), **dict.fromkeys(MOMENTS, torch.rand_like(t))} for n, t in weights.items()}
    torch.save({"state": state, "param_groups": [group]}, source / "optimizer.bin")
    surgery.convert(source, tmp_path / "one", to="neox", optimizer=True)
    with pytest.raises(ConfigError, match="shares of biases"):
        surgery.convert(source, tmp_path / "two", to="neox", optimizer=True, topology=Topology(tp=2))


def _spoil(folder: Path, lie: str) -> None:
    home = next(folder.rglob("zero")) / "sequential.2.mlp.linear2.weight"
    if lie == "missing":
        (home / "exp_avg.pt").unlink()
    elif lie == "shape":
        torch.save({"param": torch.zeros(3, 3)}, home / "exp_avg.pt")
    elif lie == "surplus":
        home.with_name("sequential.9.nothing.weight").mkdir()
    elif lie == "steps":
        torch.save(float("nan"), home / "step.pt")
    elif lie == "master":
        torch.save({"param": torch.load(home / "fp32.pt")["param"] + 1}, home / "fp32.pt")
    else:
        torch.save({"param": Attack(folder / "executed")}, home / "exp_avg.pt")


@pytest.mark.parametrize(("lie", "words"), [
    ("missing", "is missing"), ("shape", "has the shape"), ("surplus", "which is no weight"), ("steps", "steps"),
    ("master", "does not round to its weight"), ("pickle", "holds no tensor"),
])  # fmt: skip
def test_universal_checkpoints_that_lie_are_refused(lie, words, universal, tmp_path):
    shutil.copytree(universal, tmp_path / "m")
    _spoil(tmp_path / "m", lie)
    with pytest.raises(SurgeryError, match=words):
        values(opened(tmp_path / "m"))
    assert not (tmp_path / "m" / "executed").exists()


def test_masters_of_an_fp32_model_are_held_to_its_weights(tmp_path):
    folder = written(tmp_path, case="hf-llama")
    assert equal(values(opened(folder)), values(opened(GOLDEN / "hf-llama")))
    _spoil(folder, "master")
    with pytest.raises(LayoutError, match="does not round to its weight"):
        values(opened(folder))


@pytest.mark.thorough
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed beside torch")
def test_deepspeed_itself_goes_on_from_a_universal_checkpoint(universal, tmp_path):
    """Its engine holds our masters, moments, steps and settings; its next three updates are those of plain AdamW."""
    script = Path(__file__).parent / "upstream" / "load_deepspeed.py"
    subprocess.run([sys.executable, "-W", "ignore", script, universal, tmp_path / "s.pt"], check=True, timeout=280)
    found = torch.load(tmp_path / "s.pt", weights_only=True)
    zero = universal / (universal / "latest_universal").read_text() / "zero"
    ours = {name: {f: torch.load(zero / name / f"{f}.pt", weights_only=True)["param"] for f in ("fp32", *MOMENTS)}
            for name in found["loaded"]}  # fmt: skip
    assert found["steps"] == [2, 2] and [g["weight_decay"] for g in found["groups"]] == [0.1, 0.0]
    for name, held in found["loaded"].items():
        assert same_bits(held["master"].view_as(ours[name]["fp32"]), ours[name]["fp32"])
        assert same_bits(held["weight"], ours[name]["fp32"].bfloat16())
        assert all(same_bits(held[role].view_as(ours[name][role]), ours[name][role]) for role in MOMENTS)
    plain = {name: torch.nn.Parameter(held["fp32"].clone()) for name, held in ours.items()}
    kinds = [[p for p in plain.values() if (p.ndim > 1) == decayed] for decayed in (True, False)]
    optimizer = torch.optim.AdamW([{"params": p, **g} for p, g in zip(kinds, found["groups"], strict=True)])
    for name, p in plain.items():
        optimizer.state[p] = {"step": torch.tensor(2.0), **{role: ours[name][role].clone() for role in MOMENTS}}
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for p in plain.values():
            p.grad = torch.randn(p.shape, generator=generator).bfloat16().float()
        optimizer.step()
    far = {n: float((p - found["later"][n]["master"].view_as(p)).detach().abs().max()) for n, p in plain.items()}
    assert max(far.values()) < 1e-6

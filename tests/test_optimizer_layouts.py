"""Layouts of optimizer states that no golden has: laid out here by naive loops from states that goldens hold.

What is read must be the golden's state, bit for bit, and the masters must round to the weights.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import surgery
from surgery.errors import LayoutError
from surgery.formats.megatron.dist_optimizer import _like
from surgery.formats.optimizer import MOMENTS
from surgery.formats.topology import Topology
from surgery.tensors.in_memory import InMemory
from tests import tiny
from tests.oracle import same_bits
from tests.test_optimizer import GOLDEN, RANK, copied, equal, opened, trees, trees_without_deepspeed, values

# ------------------------------------------------------------------------------ Megatron's flat buffers, on any ranks


def flat_of(folder: Path, bucket: int | None) -> None:
    """Megatron's plain optimizers, laid out anew as its distributed optimizer does: last parameters first, each at a
    multiple of 64 of its bucket, a bucket ending with the parameter that fills it; without buckets on later stages."""
    for path in sorted(folder.rglob("model_optim_rng.pt")):
        tree = trees(path)
        model = {n: t for n, t in tree["model"].items() if isinstance(t, torch.Tensor)}
        plain, masters = (
            tree["optimizer"]["optimizer"],
            [m for g in tree["optimizer"]["fp32_from_fp16_params"] for m in g],
        )
        decayed = [n for n, t in model.items() if t.ndim > 1 and not n.endswith(".bias")]
        numbers = {n: i for i, n in enumerate([*decayed, *(n for n in model if n not in decayed)])}
        first = len(path.parent.name.split("_")) < 4 or path.parent.name.endswith("_000")
        buckets: list[list[str]] = [[]]
        sizes = [0]
        for name in reversed(list(model)):
            sizes[-1] = -(-sizes[-1] // 64) * 64 + model[name].numel()
            buckets[-1].append(name)
            if bucket and first and sizes[-1] >= bucket:
                buckets.append([])
                sizes.append(0)
        flats = {}
        for key in ("param", *MOMENTS):
            pieces = []
            for names in buckets:
                whole = torch.zeros(0)
                for name in names:
                    whole = torch.cat([whole, torch.zeros(-len(whole) % 64)])
                    i = numbers[name]
                    whole = torch.cat([whole, (masters[i] if key == "param" else plain["state"][i][key]).flatten()])
                pieces.append(whole)
            flats[key] = torch.cat(pieces)
        flats["numel_unpadded"] = len(flats["param"])
        torch.save({"buckets_coalesced": True, 0: {(torch.bfloat16, torch.float32): flats}},
                   path.with_name("distrib_optim.pt"))  # fmt: skip
        groups = [{**{k: v for k, v in g.items() if k != "params"}, "step": 2.0} for g in plain["param_groups"]]
        tree["optimizer"] = {"optimizer": {"param_groups": groups}}
        tree["args"].overlap_grad_reduce, tree["args"].ddp_bucket_size = bool(bucket), bucket
        torch.save(tree, path)


@pytest.mark.parametrize(("topology", "bucket"), [
    (Topology(tp=2, pp=2), 4250), (Topology(), 16_400), (Topology(pp=2), None),
])  # fmt: skip
def test_flat_buffers_of_any_ranks_and_buckets(topology, bucket, tmp_path):
    """Two tensor ranks divide gate and up; buckets end behind a norm, where a gap would be, on
    the first stage alone."""
    surgery.convert(GOLDEN / "megatron-flat", tmp_path / "m", to="megatron", optimizer=True, topology=topology)
    want = values(opened(tmp_path / "m"))
    flat_of(tmp_path / "m", bucket)
    assert equal(values(opened(tmp_path / "m")), want)
    assert equal(want, values(opened(GOLDEN / "megatron-flat")))
    if bucket:
        path = next(tmp_path.rglob("*_000/model_optim_rng.pt"), None) or next(tmp_path.rglob("model_optim_rng.pt"))
        tree = trees(path)
        tree["args"].ddp_bucket_size = 10 * bucket  # no border there: the length tells
        torch.save(tree, path)
        with pytest.raises(LayoutError, match="do not fill in any known way"):
            values(opened(tmp_path / "m"))


@pytest.mark.slow
def test_a_tied_embedding_on_two_stages_is_one_state(tmp_path):
    """The last stage keeps the embedding again, with a state of its own that must be the same."""
    source = tiny.save("llama_tied", tmp_path / "hf", l=2, h=48, f=40, v=256, rope_parameters={
        "rope_type": "default", "rope_theta": 1e4}, max_position_embeddings=128)  # fmt: skip
    with torch.device("meta"):
        model = tiny.model("llama_tied", l=2, h=48, f=40, v=256)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    both = [[n for n in shapes if ("norm" in n) == kind] for kind in (False, True)]
    generator = torch.Generator().manual_seed(5)
    state = {i: {"step": torch.tensor(4.0), **{r: torch.rand(shapes[n], generator=generator) for r in MOMENTS}}
             for i, n in enumerate([*both[0], *both[1]])}  # fmt: skip
    group = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    cut = len(both[0])
    groups = [
        {**group, "params": list(range(cut))},
        {**group, "weight_decay": 0.0, "params": list(range(cut, len(state)))},
    ]
    torch.save({"state": state, "param_groups": groups}, source / "optimizer.pt")
    surgery.convert(source, tmp_path / "m", to="megatron", optimizer=True, topology=Topology(pp=2), dtype="bf16")
    assert same_bits(values(opened(tmp_path / "m"))["exp_avg/embed"], state[0]["exp_avg"])
    path = next((tmp_path / "m").rglob("*_001/model_optim_rng.pt"))
    last = trees(path)
    names = [n for n, t in last["model"].items() if isinstance(t, torch.Tensor) and t.ndim > 1]
    at = names.index("output_layer.weight")
    last["optimizer"]["optimizer"]["state"][at]["exp_avg"].add_(1)
    torch.save(last, path)
    with pytest.raises(LayoutError, match="differ"):
        values(opened(tmp_path / "m"))


# ---------------------------------------------------------------------------------------------- ZeRO, told otherwise


def rewritten(folder: Path, change, **settings) -> Path:
    for mp in range(2):
        path = folder / RANK.format(mp)
        state = trees_without_deepspeed(path)["optimizer_state_dict"]
        change(state)
        torch.save({"optimizer_state_dict": state, "ds_config": {"zero_optimization": settings}}, path)
    return folder


def test_elastic_lists_are_read_and_their_silence_is_told(tmp_path):
    """elastic_checkpoint: a list of states, no groups, the step apart."""

    def change(state):
        base = state["base_optimizer_state"]["state"]
        state["base_optimizer_state"] = [{k: base[g][k] for k in MOMENTS} for g in (0, 1)]
        state["base_optimizer_state_step"] = 2

    found = opened(rewritten(copied("neox-zero1", tmp_path / "run"), change), "neox-zero1")
    assert equal(values(found), values(opened(GOLDEN / "neox-zero1", "neox-zero1")))
    assert any("do not say the settings" in note for note in found.optimizer.notes)
    assert not any("do not say" in note for note in opened(GOLDEN / "neox-zero1", "neox-zero1").optimizer.notes)


def test_slice_mappings_that_lie_change_nothing(tmp_path):
    """round_robin_gradients: DeepSpeed writes other parameters' names there."""

    def change(state):
        state["param_slice_mappings"] = [{"final_linear.weight": {"start": 0, "numel": 10**12}}] * 2

    plain = opened(GOLDEN / "neox-zero1", "neox-zero1")
    folder = rewritten(copied("neox-zero1", tmp_path / "run"), change, round_robin_gradients=True)
    found = opened(folder, "neox-zero1")
    assert equal(values(found), values(plain))
    assert any("ds_to_universal would swap moments" in note for note in found.optimizer.notes)
    assert not any("ds_to_universal" in note for note in plain.optimizer.notes)


# ----------------------------------------------------------------------------------------------- torch_dist, as cells


@pytest.mark.parametrize(
    ("shape", "grid"), [((2, 8, 6), (2, 4, 1)), ((2, 8, 6), (2, 1, 3)), ((8, 6), (2, 3)), ((6,), (1,))]
)
def test_cells_of_any_grid(shape, grid):
    """TP 2 divides fc1's gate and up (four cells of rows), linear_proj's columns: naive loops cut, the reader joins."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    cell = [w // n for w, n in zip(shape, grid, strict=True)]
    stored = torch.empty(*grid, int(torch.tensor(cell).prod()))
    for at in torch.cartesian_prod(*(torch.arange(n) for n in grid)).reshape(-1, len(grid)).tolist():
        box = tuple(slice(i * c, (i + 1) * c) for i, c in zip(at, cell, strict=True))
        stored[tuple(at)] = weight[box].flatten()
    found = _like("k", InMemory(stored), {"k": InMemory(weight)}, "f")
    assert same_bits(found.full(), weight)


def changed_dist(folder: Path, change) -> None:
    """A torch_dist folder written again by torch, with other keys or values."""
    where = next(folder.glob("iter_*"))
    dcp_to_torch_save(where, folder / "all.pt")
    state = change(torch.load(folder / "all.pt", weights_only=False))
    for file in (*where.glob("*.distcp"), where / ".metadata", folder / "all.pt"):
        file.unlink()
    dcp.save(state, storage_writer=dcp.FileSystemWriter(where), no_dist=True)
    assert json.loads((where / "metadata.json").read_text())["sharded_backend"] == "torch_dist"


def test_states_of_chained_optimizers(tmp_path):
    """Dense and expert parameters in optimizers of their own: chained_0. and chained_1. before the keys."""
    surgery.convert(GOLDEN / "hf-qwen3_moe", tmp_path / "m", to="megatron-dist", optimizer=True)
    want = values(opened(tmp_path / "m"))

    def change(state):
        return {
            (f"chained_{int('.experts.' in n)}.{n}" if n.startswith("optimizer.") else n): t for n, t in state.items()
        }

    changed_dist(tmp_path / "m", change)
    assert equal(values(opened(tmp_path / "m")), want)

"""Adam's state between formats: the programs' own files, every way through every format, and what may not pass.

The goldens are two updates by Megatron-LM (plain, distributed, and in every form of torch_dist;
`tests/test_optimizer_megatron.py` has more of those), by GPT-NeoX with ZeRO-1 on two ranks, by OLMo
(`tests/upstream/continue_olmo.py make`), by OLMo-core with FSDP on two ranks
(`tests/upstream/make_olmo_core_goldens.py`), and by transformers' Trainer (`tests/upstream/make_trainer_goldens.py`;
`tests/test_optimizer_hf.py` has more).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import surgery
from surgery.errors import ConfigError, FileError, LayoutError, NoStateError, SurgeryError, UsageError
from surgery.formats.base import Checkpoint
from surgery.formats.flat import aligned
from surgery.formats.megatron.files import open_rank
from surgery.formats.megatron.order import place
from surgery.formats.optimizer import MASTER, MOMENTS, ROLES, M, V
from surgery.formats.registry import open_checkpoint
from surgery.formats.topology import Topology
from surgery.tensors.extent import Extent
from surgery.tensors.lazy import walk
from tests import oracle

GOLDEN = oracle.GOLDEN / "optimizer"
OPTIONS = {"neox-zero1": {"release": "2024-11"}}
CASES = ("megatron-plain", "megatron-flat", "megatron-cells", "neox-zero1", "olmo-core", "hf-llama", "hf-qwen3_moe",
         "megatron-buckets", "megatron-gathered", "megatron-reshardable", "megatron-buckets-experts", "olmo-unsharded",
         "olmo-torch_new", "olmo-local")  # fmt: skip
NO_MASTERS = ("olmo-core", "hf-llama", "hf-qwen3_moe", "olmo-unsharded", "olmo-torch_new", "olmo-local")
MODEL = "iter_0000002/mp_rank_00/model_optim_rng.pt"
FLAT = "iter_0000002/mp_rank_00/distrib_optim.pt"
RANK = "global_step250/bf16_zero_pp_rank_0_mp_rank_0{}_optim_states.pt"


def opened(folder: Path, case: str = "") -> Checkpoint:
    return open_checkpoint(folder, options=OPTIONS.get(case), optimizer=True)


def copied(case: str, folder: Path) -> Path:
    shutil.copytree(GOLDEN / case, folder)
    return folder


def values(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    assert checkpoint.optimizer
    return {f"{role}/{n}": t.full() for role in ROLES for n, t in checkpoint.optimizer.roles[role].items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(oracle.same_bits(a[n], b[n]) for n in a)


def trees(path: Path) -> dict:
    """torch's own account of a file whose classes it need not know."""
    return torch.load(path, weights_only=False)


# --------------------------------------------------------------------------------- what the programs' own files hold


@pytest.mark.parametrize("case", CASES)
def test_masters_round_to_the_stored_weights(case):
    """The proof, made here with torch alone: and no part is without a state."""
    checkpoint = opened(GOLDEN / case, case)
    found = checkpoint.optimizer
    assert found and found.step == 2
    assert found.kept == (case not in NO_MASTERS)
    assert not any("do not say the settings" in note for note in found.notes)
    for name, part in checkpoint.parts.items():
        master = found.roles[MASTER][name].full()
        assert master.dtype == torch.float32
        assert oracle.same_bits(master.to(part.torch_dtype), part.full())
        assert found.roles[V][name].full().min() >= 0
        assert found.roles[M][name].full().count_nonzero()


def test_flat_buffers_and_cells_of_one_run_are_the_same_state():
    """Two runs of the same seed, saved in two formats by upstream: all that was read agrees, bit for bit."""
    assert equal(values(opened(GOLDEN / "megatron-flat")), values(opened(GOLDEN / "megatron-cells")))


@pytest.mark.parametrize("layout", ["torch_new", "local"])
def test_shards_of_olmo_are_the_state_that_it_saved_whole(layout):
    """One run, saved by OLMo in three layouts; of `local`, no rank has something of every tensor."""
    found, whole = opened(GOLDEN / f"olmo-{layout}"), opened(GOLDEN / "olmo-unsharded")
    assert equal(values(found), values(whole))
    assert found.optimizer.groups == whole.optimizer.groups
    counts = [len(trees(path)["state"]) for path in sorted((GOLDEN / "olmo-local" / "optim").iterdir())]
    assert max(counts) < len(trees(GOLDEN / "olmo-unsharded" / "optim.pt")["state"])


def test_settings_and_rate():
    found = opened(GOLDEN / "megatron-flat").optimizer
    assert found.groups["layers.{l}.attn.q"].weight_decay == 0.1
    assert found.groups["layers.{l}.attn_norm"].weight_decay == 0.0
    assert found.groups["embed"].betas == (0.9, 0.999)
    assert found.lr == pytest.approx(0.00082)
    assert "fp32 masters, both moments after 2 steps, learning rate 0.00082" in found.said()
    zero = opened(GOLDEN / "neox-zero1", "neox-zero1").optimizer
    assert zero.groups["final_norm"].weight_decay == 0.0
    assert zero.groups["embed"].weight_decay == 0.1
    core = opened(GOLDEN / "olmo-core").optimizer
    assert {name for name, group in core.groups.items() if not group.weight_decay} == {"embed"}


# ------------------------------------------------------------------------------------------------ every way through

WAYS = {
    "megatron": {"to": "megatron"},
    "megatron, divided": {"to": "megatron", "topology": Topology(tp=2, pp=2)},
    "megatron, flat": {"to": "megatron", "topology": Topology(tp=2, pp=2), "options": {"optimizer": "distributed"}},
    "megatron-dist": {"to": "megatron-dist"},
    "olmo": {"to": "olmo"},
    "olmo-core": {"to": "olmo-core"},
    "hf": {"to": "hf"},
    "hf, by name": {"to": "hf", "options": {"optimizer": "fsdp"}},
    "neox": {"to": "neox", "topology": Topology(pp=0)},
}


PAIRS = [
    pytest.param(
        case, way, marks=[] if i % len(WAYS) == j else [pytest.mark.thorough]
    )  # a sample, in which each stands once
    for i, case in enumerate(CASES)
    for j, way in enumerate(WAYS)
]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "way"), PAIRS)
def test_there_and_the_state_is_the_same(case, way, tmp_path):
    """Every golden into every format that has a place for it: equal bits, equal steps, equal settings."""
    source = opened(GOLDEN / case, case)
    how = {**WAYS[way], "options": {**OPTIONS.get(case, {}), **WAYS[way].get("options", {})}}
    try:
        done = surgery.convert(GOLDEN / case, tmp_path / "out", optimizer=True, **how)
    except (ConfigError, LayoutError) as error:
        options = {name: value for name, value in how["options"].items() if name != "optimizer"}
        with pytest.raises(SurgeryError, match=str(error.what)[:30].replace("(", r"\(")):
            surgery.convert(GOLDEN / case, tmp_path / "alone", **{**how, "options": options})
        pytest.skip(f"the weights cannot go there either: {error.what[:60]}")
    assert done.verified
    assert any("carried: the optimizer's state" in note for note in done.notes)
    back = opened(tmp_path / "out")
    assert back.optimizer and back.optimizer.step == 2
    assert equal(values(source), {n: t[: values(source)[n].shape[0]] for n, t in values(back).items()})
    same = {n: g for n, g in back.optimizer.groups.items() if n in source.optimizer.groups} == source.optimizer.groups
    assert same or any("did otherwise before" in note for note in done.notes)  # a Trainer decays by rules of its own


def test_default_is_weights_alone(tmp_path):
    done = surgery.convert(GOLDEN / "megatron-plain", tmp_path / "out", to="olmo")
    assert not (tmp_path / "out" / "optim.pt").exists()
    assert "starts" in next(why for name, why in done.dropped.items() if name == "optimizer")
    assert opened(tmp_path / "out").optimizer is None
    with pytest.raises(FileError, match="holds no optimizer's state"):
        surgery.convert(tmp_path / "out", tmp_path / "again", to="olmo-core", optimizer=True)
    with pytest.raises(ConfigError, match="written without an optimizer's state"):
        surgery.convert(GOLDEN / "megatron-plain", tmp_path / "meta", to="meta", optimizer=True)


def test_masters_become_the_weights_or_are_rounded(tmp_path):
    """OLMo keeps no masters: its weights are they; asked for bf16, the weights are the stored ones."""
    source = opened(GOLDEN / "megatron-plain")
    surgery.convert(GOLDEN / "megatron-plain", tmp_path / "exact", to="olmo", optimizer=True)
    exact = open_checkpoint(tmp_path / "exact")
    assert all(oracle.same_bits(exact.parts[n].full(), t.full()) for n, t in source.optimizer.roles[MASTER].items())
    done = surgery.convert(GOLDEN / "megatron-plain", tmp_path / "rounded", to="olmo", optimizer=True, dtype="bf16")
    rounded = open_checkpoint(tmp_path / "rounded")
    assert all(oracle.same_bits(rounded.parts[n].full(), t.full()) for n, t in source.parts.items())
    assert any("keeps no masters" in note for note in done.notes)


# ---------------------------------------------------------------------------------------- torch reads what was written


def test_megatrons_own_numbers(tmp_path):
    """Written as Megatron's plain optimizer, ids, steps and masters are those of its own file, for torch."""
    surgery.convert(GOLDEN / "megatron-plain", tmp_path / "out", to="megatron", optimizer=True)
    want = open_rank(GOLDEN / "megatron-plain" / MODEL).root["optimizer"]
    ours = trees(tmp_path / "out" / MODEL)["optimizer"]
    for i, fields in want["optimizer"]["state"].items():
        assert all(torch.equal(tensor.full(), ours["optimizer"]["state"][i][key]) for key, tensor in fields.items())
    for theirs, mine in zip(want["fp32_from_fp16_params"], ours["fp32_from_fp16_params"], strict=True):
        assert all(torch.equal(a.full(), b) for a, b in zip(theirs, mine, strict=True))
    for theirs, mine in zip(want["optimizer"]["param_groups"], ours["optimizer"]["param_groups"], strict=True):
        same = ("params", "betas", "eps", "weight_decay", "lr", "wd_mult", "is_expert_parallel")
        assert {key: theirs[key] for key in same} == {key: mine[key] for key in same}


def test_the_order_is_megatrons():
    for folder in ("megatron/d_moemix_legacy_tp1/checkpoint/iter_0000001", "optimizer/megatron-plain/iter_0000002"):
        names = [n for n in open_rank(oracle.GOLDEN / folder / "mp_rank_00" / "model_optim_rng.pt").chunks[0]
                 if not n.endswith("expert_bias")]  # fmt: skip
        assert sorted(names, key=place) == names


def steps(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Three more updates by gradients that depend on place alone."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def test_torch_goes_on_as_the_source_would(tmp_path):
    """torch's AdamW loads our state dict, and its next three updates are those from upstream's own moments."""
    theirs = open_rank(GOLDEN / "megatron-plain" / MODEL).root["optimizer"]
    masters = [t.full() for group in theirs["fp32_from_fp16_params"] for t in group]
    surgery.convert(GOLDEN / "megatron-cells", tmp_path / "dist", to="megatron-dist", optimizer=True)
    surgery.convert(GOLDEN / "megatron-plain", tmp_path / "olmo", to="olmo-core", optimizer=True)
    surgery.convert(tmp_path / "olmo", tmp_path / "out", to="megatron", optimizer=True, dtype="bf16",
                    options={"adam": "torch"})  # fmt: skip
    ours = trees(next((tmp_path / "out").rglob("model_optim_rng.pt")))["optimizer"]
    results = []
    for tree, start in ((theirs, masters), (ours, [t for g in ours["fp32_from_fp16_params"] for t in g])):
        parameters = [torch.nn.Parameter(t.clone()) for t in start]
        sizes = [len(g["params"]) for g in tree["optimizer"]["param_groups"]]
        optimizer = torch.optim.AdamW([{"params": parameters[: sizes[0]], "weight_decay": 0.1},
                                       {"params": parameters[sizes[0] :], "weight_decay": 0.0}], lr=1e-3)  # fmt: skip
        state = {i: {k: t.full() if hasattr(t, "full") and not isinstance(t, torch.Tensor) else t
                     for k, t in f.items()} for i, f in tree["optimizer"]["state"].items()}  # fmt: skip
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        results.append(steps(parameters, optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_every_parameter_of_olmo_counts_for_itself(tmp_path):
    """torch adds to a count in place: one that parameters share would grow by their number at every step."""
    surgery.convert(GOLDEN / "olmo-core", tmp_path / "out", to="olmo", optimizer=True)
    state = torch.load(tmp_path / "out" / "optim.pt", weights_only=True)["state"]
    trainer = torch.load(tmp_path / "out" / "train.pt", weights_only=True)  # OLMo's loader asks for it
    assert trainer["global_step"] == 2 and trainer["checkpoints"] == trainer["unsharded_checkpoints"] == []
    assert len({fields["step"].data_ptr() for fields in state.values()}) == len(state)


def test_torchs_distributed_reader_takes_ours(tmp_path):
    surgery.convert(GOLDEN / "olmo-core", tmp_path / "out", to="olmo-core", optimizer=True)
    dcp_to_torch_save(tmp_path / "out" / "model_and_optim", tmp_path / "all.pt")
    found = torch.load(tmp_path / "all.pt", weights_only=True)["optim"]
    source = opened(GOLDEN / "olmo-core")
    assert torch.equal(found["state.embeddings.weight.exp_avg"], source.optimizer.roles[M]["embed"].full())
    assert found["param_groups.embeddings.weight.weight_decay"] == 0.0
    assert found["param_groups.lm_head.w_out.weight.weight_decay"] == 0.1


# ------------------------------------------------------------------------------------------------ what may not pass


def test_two_parameters_that_changed_places_are_found(tmp_path):
    """Equal shapes, so that only the proof can see it: in a flat buffer, and among numbered masters."""
    folder = copied("megatron-flat", tmp_path / "flat")
    tree = trees(folder / FLAT)
    buffer = next(iter(tree[0].values()))["param"]
    names = [(n, t.shape) for n, t in reversed(open_rank(folder / MODEL).chunks[0].items())]
    at, _ = aligned(names, 64)
    a, b = at["decoder.layers.0.mlp.linear_fc2.weight"], at["decoder.layers.1.mlp.linear_fc2.weight"]
    size = 32 * 88
    buffer[a : a + size], buffer[b : b + size] = buffer[b : b + size].clone(), buffer[a : a + size].clone()
    torch.save(tree, folder / FLAT)
    with pytest.raises(LayoutError, match="does not round to its weight"):
        surgery.convert(folder, tmp_path / "out", to="olmo", optimizer=True)
    assert not (tmp_path / "out").exists()
    surgery.convert(folder, tmp_path / "alone", to="olmo")


def test_steps_that_differ_and_moments_that_are_missing(tmp_path):
    folder = copied("neox-zero1", tmp_path / "run")
    path = folder / RANK.format(0)
    tree = trees_without_deepspeed(path)
    tree["optimizer_state_dict"]["base_optimizer_state"]["state"][1]["step"] = 3
    torch.save(tree, path)
    with pytest.raises(LayoutError, match=r"different numbers of steps: 2\.0, 3\.0"):
        opened(folder, "neox-zero1")
    tree["optimizer_state_dict"]["base_optimizer_state"]["state"][1] = {"step": 2, "momentum_buffer": torch.zeros(320)}
    torch.save(tree, path)
    with pytest.raises(NoStateError, match="has no exp_avg of group 1"):
        opened(folder, "neox-zero1")
    path.unlink()
    with pytest.raises(FileError, match=r"zero_pp_rank_0_mp_rank_00_optim_states\.pt is missing"):
        opened(folder, "neox-zero1")


def trees_without_deepspeed(path: Path) -> dict:
    """A file of ZeRO without the records of DeepSpeed's own classes, which nothing here believes."""
    from surgery.containers import open_file

    def plain(node):
        if isinstance(node, dict):
            return {k: plain(v) for k, v in node.items() if k != "param_slice_mappings"}
        if isinstance(node, (list, tuple)):
            return type(node)(plain(v) for v in node)
        return node.full() if isinstance(node, Extent) else node

    return plain(open_file(path).root)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_partitions_of_any_number_of_ranks(ranks, tmp_path):
    """ZeRO's partitions: masters with the padding stripped, moments with it, as DeepSpeed's default writes them."""
    folder = copied("neox-zero1", tmp_path / "run")
    want = values(opened(folder, "neox-zero1"))
    for mp in range(2):
        path = folder / RANK.format(mp)
        state = trees_without_deepspeed(path)["optimizer_state_dict"]
        path.unlink()
        for dp in range(ranks):
            base = {"state": {}, "param_groups": state["base_optimizer_state"]["param_groups"]}
            part = {"base_optimizer_state": base, "single_partition_of_fp32_groups": []}
            for g, master in enumerate(state["single_partition_of_fp32_groups"]):
                padded = -(-len(master) // (2 * ranks)) * 2 * ranks
                each = padded // ranks
                moments = state["base_optimizer_state"]["state"][g]
                whole = {k: torch.cat([moments[k], torch.full((padded - len(master),), 7.0)]) for k in MOMENTS}
                part["single_partition_of_fp32_groups"].append(master[dp * each : (dp + 1) * each].clone())
                part["base_optimizer_state"]["state"][g] = {
                    "step": 2, **{k: t[dp * each : (dp + 1) * each].clone() for k, t in whole.items()}}  # fmt: skip
            torch.save({"optimizer_state_dict": part}, path.with_name(path.name.replace("rank_0_mp", f"rank_{dp}_mp")))
    assert equal(values(opened(folder, "neox-zero1")), want)


def test_a_run_that_never_counted_its_steps(tmp_path):
    """OLMo-core's SkipStepAdamW before 2025-07: step 0 beside moments is named, and carried only if one says it."""
    folder = copied("olmo-core", tmp_path / "run")
    zeroed = 0
    for file in (folder / "model_and_optim").glob("*.distcp"):
        data = bytearray(file.read_bytes())
        two = torch.tensor(2.0).numpy().tobytes()
        for tensor in _chunks(folder, file.name):
            if data[tensor.offset : tensor.offset + 4] == two:
                data[tensor.offset : tensor.offset + 4] = bytes(4)
                zeroed += 1
        file.write_bytes(data)
    assert zeroed
    with pytest.raises(LayoutError, match="SkipStepAdamW before 2025-07-03"):
        opened(folder)
    found = open_checkpoint(folder, options={"optimizer_step": "9000"}, optimizer=True).optimizer
    assert found.step == 9000
    assert "as was said" in found.notes[0]


def _chunks(folder: Path, file: str) -> list[Extent]:
    """Where the steps lie."""
    from surgery.containers.dcp import Dcp

    steps = [t for n, t in Dcp(folder / "model_and_optim").tensors.items() if n.endswith(".step")]
    leaves = [node for t in steps for node in walk(t) if isinstance(node, Extent)]
    return [leaf for leaf in leaves if Path(leaf.file.path).name == file]


@pytest.mark.parametrize("lie", ["shape", "count", "pickle", "group"])
def test_hostile_states_are_refused(lie, tmp_path):
    """Nothing is run, nothing large is made, and each ends in words."""
    folder = tmp_path / "plain"
    surgery.convert(GOLDEN / "megatron-plain", folder, to="megatron", optimizer=True)
    tree = trees(folder / MODEL)
    inner = tree["optimizer"]["optimizer"]
    if lie == "shape":
        inner["state"][0]["exp_avg"] = inner["state"][0]["exp_avg"].reshape(32, 512)
    elif lie == "count":
        inner["state"][0]["step"] = torch.tensor(1e30)
    elif lie == "group":
        inner["param_groups"][0]["betas"] = ["x"] * 100_000
    else:
        inner["state"][0]["exp_avg"] = Attack(tmp_path / "executed")
    torch.save(tree, folder / MODEL)
    with pytest.raises(SurgeryError) as error:
        opened(folder)
    assert len(str(error.value)) < 5000
    assert not (tmp_path / "executed").exists()


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(("to", "options"), [("hf", {"optimizer": "fsdp"}), ("megatron", {"max_lr": "1e-3"})])
def test_options_of_a_state_that_is_not_carried_are_refused(to, options, tiny_hf, tmp_path):
    with pytest.raises(UsageError, match=f"-O {next(iter(options))}: no state of an optimizer is carried"):
        surgery.convert(tiny_hf("llama"), tmp_path / "out", to=to, options=options)
    assert not (tmp_path / "out").exists()

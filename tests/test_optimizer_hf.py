"""A Trainer's state: transformers' own numbers for every family, its own continuation, and files that lie."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import surgery
from surgery.errors import FileError, LayoutError, SurgeryError
from surgery.formats.hf.optimizer import in_memory
from surgery.formats.hf.order import LAYERS, in_order, spared
from surgery.formats.optimizer import MOMENTS, ROLES, M
from surgery.formats.registry import open_checkpoint
from surgery.formats.topology import ONE_RANK, Rank
from surgery.formats.weave import spread
from tests import oracle, tiny
from tests.test_optimizer import GOLDEN, Attack, copied, equal, values
from tests.upstream.make_trainer_goldens import SMALL, train

MODELS = {"hf-llama": "llama", "hf-qwen3_moe": "qwen3_moe"}


@pytest.fixture(scope="module")
def trainer():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    return transformers.Trainer


SAMPLE = ("qwen2", "glm4_moe", "gpt2", "granitemoeshared")  # of each kind of layer; the rest is thorough


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f in SAMPLE else pytest.mark.thorough) for f in tiny.FAMILIES]
)
def test_the_order_is_transformers(family, trainer):
    """Every family's parameters, as its class registers them, and which of them the Trainer spares."""
    with torch.device("meta"):
        model = tiny.model(family)
    want = [n for n, p in model.named_parameters() if p.requires_grad]
    assert in_order(tiny.FAMILIES[family][0], sorted(want)) == want
    decayed = trainer.get_decay_parameter_names(None, model)
    assert [n for n in want if not spared(n)] == [n for n in want if n in decayed]


def test_every_family_but_our_own_has_an_order():
    from surgery.formats.hf.families import FAMILIES

    assert FAMILIES.keys() - LAYERS.keys() == {"attention_moe"}


@pytest.mark.parametrize("case", MODELS)
def test_states_are_those_of_the_parameters(case):
    """By torch and transformers alone: the number of a parameter in the optimizer is that of its state."""
    tree = torch.load(GOLDEN / case / "optimizer.pt", weights_only=True)
    with torch.device("meta"):
        names = [n for n, _ in tiny.model(MODELS[case], **SMALL).named_parameters()]
    listed = [n for kind in (False, True) for n in names if spared(n) == kind]
    opened = open_checkpoint(GOLDEN / case, optimizer=True)
    assert opened.optimizer and opened.optimizer.step == 2 and not opened.optimizer.kept
    for role in MOMENTS:
        woven = spread(in_memory(opened.spec.family), opened.optimizer.roles[role], opened.spec, ONE_RANK)[Rank()]
        assert {n: i for i, n in enumerate(listed)}.keys() == woven.keys()
        assert all(torch.equal(woven[n].tensor.full(), tree["state"][i][role]) for i, n in enumerate(listed))
    assert opened.optimizer.groups["final_norm"].weight_decay == 0
    assert opened.optimizer.groups["embed"].weight_decay == 0.1
    assert opened.optimizer.groups["embed"].betas == (0.9, 0.95)
    assert opened.optimizer.lr == pytest.approx(8.5355e-4, rel=1e-4)


MORE = (("hf-llama", "olmo-core"), ("hf-llama", "megatron"), ("hf-llama", "hf"), ("hf-qwen3_moe", "olmo-core"))
WAYS = [
    pytest.param("hf-qwen3_moe", "megatron-dist", marks=pytest.mark.slow),
    *(pytest.param(*way, marks=pytest.mark.thorough) for way in MORE),
]


@pytest.mark.parametrize(("case", "through"), WAYS)
def test_the_trainer_goes_on_as_from_its_own(case, through, trainer, tmp_path):
    """Three more updates by transformers' Trainer, from its own checkpoint and from ours after another format."""
    surgery.convert(GOLDEN / case, tmp_path / "there", to=through, optimizer=True)
    done = surgery.convert(tmp_path / "there", tmp_path / "back", to="hf", optimizer=True)
    assert any("resume_from_checkpoint goes on at update 2" in note for note in done.notes)
    theirs = train(MODELS[case], tmp_path / "a", GOLDEN / case)
    ours = train(MODELS[case], tmp_path / "b", tmp_path / "back")
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    (tmp_path / "back" / "optimizer.pt").unlink()
    fresh = train(MODELS[case], tmp_path / "c", tmp_path / "back")
    assert not all(torch.equal(theirs[name], fresh[name]) for name in theirs)


def test_what_the_trainer_cannot_say_is_told(tmp_path):
    """OLMo-core spares the embedding from decay: a Trainer will not, and the report says so."""
    done = surgery.convert(GOLDEN / "olmo-core", tmp_path / "out", to="hf", optimizer=True)
    told = next(note for note in done.notes if "did otherwise before" in note)
    assert "model.embed_tokens.weight" in told and "model.norm.weight" in told and "q_proj" not in told


@pytest.mark.parametrize(("apart", "decays"), [(lambda n: "embed_tokens" in n, [0.1, 0.0]), (spared, [0.0, 0.1])])
def test_groups_that_are_not_a_trainers_are_told(apart, decays, tmp_path):
    """OLMo-core's, by name: torch mixes up the decays of an optimizer that is divided as a Trainer's."""
    done = surgery.convert(
        GOLDEN / "olmo-core", tmp_path / "out", to="hf", optimizer=True, options={"optimizer": "fsdp"}
    )
    told = next(note for note in done.notes if "its groups are the source's" in note)
    assert "model.embed_tokens.weight" in told and "model.norm.weight" in told and "q_proj" not in told
    model = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    optimizer = adamw(model, apart)
    filled(model, optimizer, tmp_path / "out" / "optimizer_0")
    assert [group["weight_decay"] for group in optimizer.param_groups] == decays


# ---------------------------------------------------------------------------------------------------- states by name


def named(case: str) -> tuple[dict, dict]:
    """What torch's get_optimizer_state_dict gives after the Trainer's optimizer was loaded."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    tree = torch.load(GOLDEN / case / "optimizer.pt", weights_only=True)
    model = tiny.model(MODELS[case], **SMALL)
    both = [[p for n, p in model.named_parameters() if spared(n) == kind] for kind in (False, True)]
    optimizer = torch.optim.AdamW([{"params": owned} for owned in both])
    optimizer.load_state_dict(tree)
    return tuple(get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=flat))
                 for flat in (False, True))  # type: ignore[return-value]  # fmt: skip


@pytest.mark.parametrize("layout", ["whole", "groups", "flattened"])
def test_states_of_fsdp_are_read_by_name(layout, tmp_path):
    """What torch.distributed.checkpoint itself writes, as accelerate names it, is the state of the same run."""
    import torch.distributed.checkpoint as dcp

    folder = copied("hf-qwen3_moe", tmp_path / "run")
    (folder / "optimizer.pt").unlink()
    plain, flat = named("hf-qwen3_moe")
    if layout == "whole":
        torch.save(plain, folder / "optimizer.bin")
    else:
        state = {"optimizer": flat if layout == "flattened" else plain}
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder / "optimizer_0"), no_dist=True)
    want = open_checkpoint(GOLDEN / "hf-qwen3_moe", optimizer=True)
    found = open_checkpoint(folder, optimizer=True)
    assert equal(values(want), values(found))
    assert found.optimizer.groups == want.optimizer.groups
    assert found.optimizer.step == 2


def adamw(model: torch.nn.Module, apart: Callable[[str], bool] = spared) -> torch.optim.AdamW:
    both = [[p for n, p in model.named_parameters() if apart(n) == kind] for kind in (False, True)]
    return torch.optim.AdamW([{"params": owned} for owned in both])


def filled(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """By torch alone: the state of an optimizer from a folder, as FSDP's programs load it."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=not torch.distributed.is_initialized())
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def updated(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The parameters after three more updates."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    generator = torch.Generator().manual_seed(3)
    for group in optimizer.param_groups:
        group["fused"] = False
    for _ in range(3):
        for p in model.parameters():
            gradient = torch.randn(p.shape, generator=generator)
            p.grad = distribute_tensor(gradient, p.device_mesh, p.placements) if isinstance(p, DTensor) else gradient
        optimizer.step()
    return {n: p.full_tensor() if isinstance(p, DTensor) else p.detach() for n, p in model.named_parameters()}


def by_number(case: str) -> dict[str, torch.Tensor]:
    """Three more updates from the Trainer's own file."""
    model = tiny.model(MODELS[case], **SMALL).from_pretrained(GOLDEN / case)
    optimizer = adamw(model)
    optimizer.load_state_dict(torch.load(GOLDEN / case / "optimizer.pt", weights_only=True))
    return updated(model, optimizer)


@pytest.fixture
def sharded(tmp_path):
    """The Trainer's states after another format, written as FSDP saves them."""

    def make(case: str) -> Path:
        surgery.convert(GOLDEN / case, tmp_path / "there", to="olmo-core", optimizer=True)
        surgery.convert(tmp_path / "there", tmp_path / "back", to="hf", optimizer=True, options={"optimizer": "fsdp"})
        assert not (tmp_path / "back" / "optimizer.pt").exists()
        return tmp_path / "back"

    return make


@pytest.mark.parametrize("case", MODELS)
def test_torch_loads_states_by_name_and_goes_on_as_from_the_trainers(case, sharded):
    """torch.distributed.checkpoint's own loader takes the folder; three more updates are those of the source."""
    folder = sharded(case)
    found, want = (open_checkpoint(f, optimizer=True) for f in (folder, GOLDEN / case))
    assert equal(values(found), values(want))
    assert found.optimizer.groups.items() >= want.optimizer.groups.items()
    model = tiny.model(MODELS[case], **SMALL).from_pretrained(folder)
    optimizer = adamw(model)
    filled(model, optimizer, folder / "optimizer_0")
    ours, theirs = updated(model, optimizer), by_number(case)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def fsdp_rank(rank: int, store: str, folder: Path, case: str, out: Path) -> None:
    """Two ranks, each with its rows of every parameter."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = tiny.model(MODELS[case], **SMALL).from_pretrained(folder)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = adamw(model)
    filled(model, optimizer, folder / "optimizer_0")
    found = updated(model, optimizer)
    if rank == 0:
        torch.save(found, out)
    dist.destroy_process_group()


@pytest.mark.thorough
@pytest.mark.parametrize("case", MODELS)
def test_fsdp_itself_goes_on_from_states_by_name(case, sharded, tmp_path):
    """`fully_shard` on two ranks: the rows that each holds are read from our folder, three updates are the source's."""
    folder = sharded(case)
    torch.multiprocessing.spawn(fsdp_rank, (f"{tmp_path}/store", folder, case, tmp_path / "out.pt"), nprocs=2)
    ours, theirs = torch.load(tmp_path / "out.pt"), by_number(case)
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


# ------------------------------------------------------------------------------------------------- files that lie


def spoilt(folder: Path, change) -> Path:
    tree = torch.load(folder / "optimizer.pt", weights_only=True)
    change(tree)
    torch.save(tree, folder / "optimizer.pt")
    return folder


def _frozen(tree):
    tree["param_groups"][0]["params"].pop()
    tree["param_groups"][1]["params"] = [i - 1 for i in tree["param_groups"][1]["params"]]
    last = max(tree["state"])
    tree["state"] = {i: tree["state"][i] for i in range(last)}


LIES = {
    "shape": (lambda t: t["state"][0].update(exp_avg=torch.zeros(3, 5)), r"has the shape \[3, 5\], its weight"),
    "frozen": (_frozen, "which the model has|of which the model has"),
    "missing": (lambda t: t["state"].pop(3), "has no state of"),
    "surplus": (lambda t: t["state"].update({99: t["state"][0]}), "states for"),
    "other": (lambda t: t["state"][0].update(state1=torch.zeros(2)), "state1"),
    "amsgrad": (lambda t: t["param_groups"][0].update(amsgrad=True), "amsgrad"),
    "coupled": (lambda t: t["param_groups"][0].update(decoupled_weight_decay=False), "Adam, not AdamW"),
    "nan steps": (lambda t: t["state"][0].update(step=torch.tensor(float("nan"))), "different numbers of steps"),
    "all nan": (lambda t: [f.update(step=torch.tensor(float("nan"))) for f in t["state"].values()], "steps"),
    "many": (lambda t: t["state"][0].update(step=torch.zeros(5)), r"counts steps in a tensor of shape \[5\]"),
    "words": (lambda t: t["state"][0].update(step="2"), "does not say how often"),
    "numbers": (lambda t: t["param_groups"][0].update(params=[0] * 9), "does not number its parameters"),
    "claims": (lambda t: t["param_groups"].append({"params": list(range(10**5))}), "number its parameters|groups"),
    "whole numbers": (lambda t: t["state"][0].update(exp_avg=t["state"][0]["exp_avg"].int()), "is int32, which is not"),
    "no groups": (lambda t: t.pop("param_groups"), "is no state dict of an optimizer"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_states_that_lie_are_refused_in_words(lie, tmp_path):
    change, words = LIES[lie]
    folder = spoilt(copied("hf-llama", tmp_path / "run"), change)
    with pytest.raises((FileError, LayoutError), match=words) as error:
        open_checkpoint(folder, optimizer=True)
    assert len(str(error.value)) < 2000
    assert open_checkpoint(folder).optimizer is None  # the weights alone still open


def test_nothing_in_a_state_is_run(tmp_path):
    folder = copied("hf-llama", tmp_path / "run")
    torch.save({"state": Attack(tmp_path / "executed"), "param_groups": []}, folder / "optimizer.pt")
    with pytest.raises(SurgeryError):
        open_checkpoint(folder, optimizer=True)
    assert not (tmp_path / "executed").exists()


def test_two_states_are_one_too_many(tmp_path):
    folder = copied("hf-llama", tmp_path / "run")
    shutil.copy(folder / "optimizer.pt", folder / "optimizer.bin")
    with pytest.raises(FileError, match=r"several states of an optimizer: optimizer\.pt, optimizer\.bin"):
        open_checkpoint(folder, optimizer=True)


def test_moments_of_half_the_bits_are_widened_and_old_groups_are_understood(tmp_path):
    """A model that was loaded in bf16 has moments in bf16; Trainers before 2024-10 let RMSNorms decay."""

    def change(tree):
        for fields in tree["state"].values():
            fields |= {role: fields[role].bfloat16() for role in MOMENTS}
        tree["param_groups"] = [{**tree["param_groups"][0], "params": list(range(len(tree["state"])))}]

    folder = copied("hf-llama", tmp_path / "run")
    tree = torch.load(folder / "optimizer.pt", weights_only=True)
    with torch.device("meta"):
        names = [n for n, _ in tiny.model("llama", **SMALL).named_parameters()]
    listed = [n for kind in (False, True) for n in names if spared(n) == kind]
    tree["state"] = {i: tree["state"][listed.index(n)] for i, n in enumerate(names)}
    change(tree)
    torch.save(tree, folder / "optimizer.pt")
    found, want = open_checkpoint(folder, optimizer=True), values(open_checkpoint(GOLDEN / "hf-llama", optimizer=True))
    assert any("moments in bfloat16 are widened" in note for note in found.optimizer.notes)
    assert found.optimizer.groups["final_norm"].weight_decay == 0.1
    for name, tensor in values(found).items():
        role = name.partition("/")[0]
        assert role in ROLES
        assert oracle.same_bits(tensor, want[name].bfloat16().float() if role in MOMENTS else want[name])
    assert M in MOMENTS

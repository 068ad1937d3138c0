"""Nothing lies beside the weights in silence: every file of a folder and every entry of a pickle is accounted for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.containers import open_file
from surgery.errors import ConfigError
from surgery.formats.account import READ, UNKNOWN_ENTRY, UNKNOWN_FILE, Rule, beside, inside, summed_up
from surgery.formats.registry import open_checkpoint


@pytest.fixture
def llama(tiny_hf, tmp_path):
    return Path(shutil.copytree(tiny_hf("llama"), tmp_path / "llama"))


BESIDE = {
    "optimizer.pt": "the optimizer's state",
    "scheduler.pt": "the scheduler's state",
    "rng_state_0.pth": "random states",
    "trainer_state.json": "the trainer's own state",
    "training_args.bin": "the trainer's own state",
    "pytorch_model.bin": "other weights",
    "consolidated.00.pth": "other weights",
    "modeling_llama.py": "code, which is never run",
    "README.md": "documentation",
    "secret.xyz": UNKNOWN_FILE,
    "checkpoint-500/x": "another checkpoint",
    "some folder/x": UNKNOWN_FILE,
}


def test_every_file_beside_the_weights_is_named(llama, tmp_path):
    for name in BESIDE:
        (llama / name).parent.mkdir(exist_ok=True)
        (llama / name).write_text("x")
    for name in (".gitattributes", ".git/config", ".cache/x"):  # of no interest
        (llama / name).parent.mkdir(exist_ok=True)
        (llama / name).write_text("x")
    found = open_checkpoint(llama).ignored
    named = {name if "/" not in name else name.partition("/")[0] + "/": why for name, why in BESIDE.items()}
    assert found.keys() == named.keys()
    assert all(why in found[name] for name, why in named.items())
    report = surgery.convert(llama, tmp_path / "out", to="meta")
    assert report.dropped == found
    assert json.loads((tmp_path / "out" / "surgery.json").read_text())["dropped"] == found


def test_many_of_a_kind_are_one_line(llama):
    for rank in range(12):
        (llama / f"rng_state_{rank}.pth").write_text("x")
    assert list(open_checkpoint(llama).ignored) == ["rng_state_N.pth (12 times)"]
    left = summed_up([("a.1.b", "x"), ("a.2.b", "x"), ("a.3.b", "y"), ("a.1.b", "x")])
    assert left == {"a.N.b (2 times)": "x", "a.3.b": "y"}


def test_small_files_travel_with_the_model(llama, tmp_path):
    (llama / "LICENSE").write_text("do what you like")
    templates = llama / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("{{ messages }}")
    (llama / "NOTICE").symlink_to("/etc/hostname")
    opened = open_checkpoint(llama)
    assert opened.ignored["NOTICE"] == "it is a link out of the folder"
    assert set(opened.beside) == {
        "LICENSE", "additional_chat_templates/tool_use.jinja", "generation_config.json"
    }  # fmt: skip
    surgery.convert(llama, tmp_path / "meta", to="meta")
    surgery.convert(tmp_path / "meta", tmp_path / "back", to="hf")
    for name in ("LICENSE", "additional_chat_templates/tool_use.jinja", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (llama / name).read_bytes()
    assert not (tmp_path / "back" / "NOTICE").exists()
    report = surgery.convert(llama, tmp_path / "megatron", to="megatron")
    assert any(note.startswith("megatron has no place for LICENSE") for note in report.notes)


def test_an_adapter_beside_the_weights_is_another_model(llama):
    (llama / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"'adapter_config.json' lies beside the weights: an adapter") as error:
        open_checkpoint(llama)
    assert "surgery soup" in str(error.value)


def test_every_entry_of_a_pickle_is_named(llama, tmp_path):
    weights = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    more = {"epoch": 3, "ema": {"decay": [0.9, 0.99]}, "nothing": None, "layers": []}
    torch.save({**weights, **more}, llama / "pytorch_model.bin")
    assert open_checkpoint(llama).ignored == {"epoch": UNKNOWN_ENTRY, "ema": UNKNOWN_ENTRY}


def test_entries_are_named_as_a_whole_where_nothing_in_them_is_known(tmp_path):
    tensor, other = torch.ones(2), torch.zeros(3)
    loop: list[object] = [1]
    loop.append(loop)
    deep: object = 1
    for _ in range(80):
        deep = [deep]
    torch.save(
        {"model": {"w": tensor, "step": 7}, "optimizer": {"state": {0: other}}, "args": {"a": 1, "b": 2}, "loop": loop,
         "deep": deep, "counters": {"seen": 5, "lost": 6}},
        tmp_path / "x.pt",
    )  # fmt: skip
    tree = open_file(tmp_path / "x.pt")
    rules = (Rule("args", verdict=READ), Rule(r"(optimizer)(?:\..*)?", "a state"), Rule(r"counters\.seen", "seen"))
    found = inside(tree, {id(tree.root["model"]["w"])}, rules)
    assert dict(found) == {
        "model.step": UNKNOWN_ENTRY, "optimizer": "a state", "loop": UNKNOWN_ENTRY, "deep": UNKNOWN_ENTRY,
        "counters.seen": "seen", "counters.lost": UNKNOWN_ENTRY,
    }  # fmt: skip


def test_structures_that_share_their_parts_are_walked_once(tmp_path):
    node: object = [1]
    for _ in range(60):  # 2 ** 60 paths
        node = [node, node]
    torch.save({"w": torch.ones(2), "bomb": node}, tmp_path / "x.pt")
    tree = open_file(tmp_path / "x.pt")
    assert inside(tree, {id(tree.root["w"])}, ()) == [("bomb", UNKNOWN_ENTRY)]


def test_rules_of_a_format_come_first(tmp_path):
    (tmp_path / "optimizer.pt").write_text("x")
    (tmp_path / "weights").write_text("x")
    own = (Rule(r"optimizer\.pt", "mine"),)
    assert beside(tmp_path, {tmp_path / "weights"}, own).left == {"optimizer.pt": "mine"}
    assert "--optimizer" in beside(tmp_path, {tmp_path / "weights"}, ()).left["optimizer.pt"]


def test_names_from_a_folder_are_printed_in_ascii(tmp_path):
    (tmp_path / "\x1b[31mred").write_text("x")
    assert list(beside(tmp_path, (), ()).left) == ["\\x1b[31mred"]

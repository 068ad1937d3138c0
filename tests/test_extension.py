"""docs/extending.md, followed to the letter: a family and a format added from outside, held to what all others are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.containers import open_file
from surgery.containers.output import OutputFile, text_file
from surgery.containers.safetensors import safetensors_file
from surgery.containers.text import read_json
from surgery.conversion.convert import execute, plan_for
from surgery.conversion.request import Write
from surgery.errors import ConfigError, LayoutError, SurgeryError
from surgery.formats.base import Draft, Format, Opened, Place, Ranks, Reading, mapping
from surgery.formats.hf import rows
from surgery.formats.hf.families import _DENSE, FAMILIES, Family, _absent
from surgery.formats.keys import Fixed, Key, Keys, Pair, read, write
from surgery.formats.registry import FORMATS, open_checkpoint
from surgery.formats.table import Table, row
from surgery.formats.topology import ONE_RANK, Rank
from surgery.formats.unknown import Unknown
from surgery.model.spec import Rope, Spec
from tests import oracle, reference, tiny
from tests.test_formats import BASES, checkpoint, variants

EXTENDING = Path(__file__).parent.parent / "docs" / "extending.md"

# ------------------------------------------------------------------------------------------------ a family: Phi-3

_L = "model.layers.{l}."
FUSED = (
    *(r for r in rows.LLAMA_LIKE if not re.search(r"\.(q|k|v|gate|up)_proj\.", r.name)),
    row(_L + "self_attn.qkv_proj.weight", "attn.q", "attn.k", "attn.v", layout="* h"),
    row(_L + "mlp.gate_up_proj.weight", "mlp.gate", "mlp.up", layout="(* f) h"),
)
PHI3 = Family(
    "phi3", "Phi3ForCausalLM", _DENSE,
    _absent(rms_norm_eps=1e-5, max_position_embeddings=4096, original_max_position_embeddings=4096),
    bias=(), window="all", partial=True, ropes=("default", "longrope"), rows=FUSED,
)  # fmt: skip
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4],
        "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0]}  # fmt: skip
MODELS = {
    "plain": {},
    "long": {"max_position_embeddings": 64, "original_max_position_embeddings": 16, "rope_parameters": LONG},
    "part of a head": {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.8, "rope_type": "default"}},
    "window": {"sliding_window": 5},
}


@pytest.fixture
def phi3(monkeypatch):
    monkeypatch.setitem(FAMILIES, "phi3", PHI3)  # type: ignore[arg-type]
    monkeypatch.setitem(tiny.FAMILIES, "phi3", ("phi3", {}, {"rms_norm_eps": 1e-5}))  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_a_family_is_a_row_of_data(phi3, tmp_path, changes):
    source = tiny.save("phi3", tmp_path / "source", pad_token_id=None, **changes)
    read, ids = open_checkpoint(source), torch.arange(40).reshape(2, 20) * 5 % 264
    assert not any(isinstance(note, Unknown) for note in read.notes)
    theirs = oracle.hf_logits(source, ids)
    assert oracle.gap(theirs, reference.logits(read, ids)) < 2e-4
    spec = read.spec
    execute(plan_for(read, Write(to="hf")), tmp_path / "fresh")
    kept, before = load_file(tmp_path / "fresh" / "model.safetensors"), load_file(source / "model.safetensors")
    assert kept.keys() == before.keys()
    assert all(torch.equal(kept[name], before[name]) for name in kept)
    assert oracle.gap(oracle.hf_logits(tmp_path / "fresh", ids), theirs) < 1e-5
    if spec.rope.fraction == 1 and not spec.rope.scaling and not spec.windows:
        surgery.convert(source, tmp_path / "meta", to="meta")
        surgery.convert(tmp_path / "meta", tmp_path / "back", to="hf", options={"family": "auto"})
        assert oracle.gap(oracle.hf_logits(tmp_path / "back", ids), theirs) < 1e-5


def test_what_only_it_holds_finds_it(phi3):
    """A part of a head with RMSNorm: refused for want of such a family, until there is one."""
    from surgery.formats.hf.config import choose_family

    assert choose_family(BASES["llama"].replace(rope=Rope(1e4, 0.5))) == "phi3"


def test_a_row_that_is_missing_is_one_line(phi3, monkeypatch, tmp_path):
    source = tiny.save("phi3", tmp_path / "source", pad_token_id=None)
    less = [r for r in FUSED if "qkv" not in r.name]
    monkeypatch.setitem(FAMILIES, "phi3", replace(PHI3, rows=(*less, *rows.LLAMA_LIKE[2:8])))
    with pytest.raises(LayoutError) as error:
        open_checkpoint(source)
    text = str(error.value)
    assert "model.layers.N.self_attn.{k,q,v}_proj.weight (6 of each) are missing" in text
    assert "6 tensors have no place in a hf phi3: model.layers.N.self_attn.qkv_proj.weight" in text
    assert len(text.splitlines()) < 5


# ---------------------------------------------------------------------------------------------------- a format: toy

CONFIG, WEIGHTS = "toy.json", "toy.safetensors"


def _read_heads(keys: Keys) -> dict[str, int]:
    heads, width = keys.integer("n_head"), keys.integer("n_embd")
    if width % heads:
        raise ConfigError(f"{heads} heads do not divide a width of {width}", file=keys.file)
    return {"kv_heads": heads, "group": 1, "head_dim": width // heads}


TABLE = (
    Key("n_embd", "width"), Key("n_layer", "layers"), Key("vocab_size", "vocab"), Key("n_inner", "ffn"),
    Key("block_size", "context"), Pair(_read_heads, lambda spec: {"n_head": spec.heads}),
    Key("eps", "norm_eps", 1e-5), Fixed("bias", False),
    Pair(lambda keys: {"rope": Rope(keys.real("theta"))}, lambda spec: {"theta": (spec.rope or Rope()).base}),
)  # fmt: skip
ROWS = (
    row("wte", "embed"),
    row("h.{l}.ln_1", "attn_norm"),
    row("h.{l}.attn", "attn.q", "attn.k", "attn.v", layout="h *"),
    row("h.{l}.proj", "attn.o", layout="(g n d) h"),
    row("h.{l}.ln_2", "mlp_norm"),
    row("h.{l}.fc", "mlp.gate", "mlp.up", layout="(* f) h"),
    row("h.{l}.out", "mlp.down"),
    row("ln_f", "final_norm"),
    row("head", "lm_head"),
)  # fmt: skip


def locate(folder: Path) -> Place | None:
    return Place(folder, folder) if (folder / CONFIG).is_file() else None


def read_toy(place: Place, options) -> Opened:
    file, weights = place.folder / CONFIG, open_file(place.folder / WEIGHTS)
    return Opened(mapping(file, read_json), str(file), {Rank(): weights.tensors}, (weights,), (file,))


def spec_of(config, file: str, seen, options) -> Reading:
    keys = Keys(config, file)
    spec = Spec(family="llama", **read(TABLE, keys))
    keys.check()
    return Reading(spec, tuple(Unknown(*item) for item in keys.unknown(()).items()))


def draft(made, topology, options) -> Draft:
    config = write(TABLE, made.spec)

    def files(ranks: Ranks) -> Iterable[OutputFile]:
        yield text_file(CONFIG, json.dumps(config).encode())
        yield safetensors_file(WEIGHTS, {name: stored.tensor for name, stored in ranks[Rank()].items()})

    return Draft(config, None, Table("toy", ROWS), ONE_RANK, files)


TOY = Format("toy", "The toy format", "Toy (toy.json, toy.safetensors)", locate, read_toy, spec_of,
             lambda opened, reading, options: Table("toy", ROWS), draft)  # fmt: skip


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(FORMATS, "toy", TOY)  # type: ignore[arg-type]


@pytest.fixture
def source(tmp_path):
    return tiny.save("llama", tmp_path / "source", num_key_value_heads=12)


def test_a_format_reads_and_writes(toy, source, tmp_path):
    surgery.convert(source, tmp_path / "toy", to="toy")
    stored, theirs = load_file(tmp_path / "toy" / WEIGHTS), load_file(source / "model.safetensors")
    at = "model.layers.3.self_attn."
    qkv = torch.cat([theirs[f"{at}{x}_proj.weight"] for x in "qkv"])
    assert torch.equal(stored["h.3.attn"], qkv.T)
    assert torch.equal(stored["h.3.proj"], theirs[at + "o_proj.weight"].T)
    surgery.convert(tmp_path / "toy", tmp_path / "back", to="hf")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)
    surgery.convert(tmp_path / "toy", tmp_path / "core", to="olmo-core")
    assert surgery.verify(tmp_path / "core", tmp_path / "toy").same_weights


def test_the_core_keeps_its_promises(toy, source, tmp_path):
    """Nothing of this is in the format: files are accounted for, unknown keys and odd dtypes refused."""
    surgery.convert(source, tmp_path / "toy", to="toy")
    (tmp_path / "toy" / "optimizer.bin").write_bytes(b"1234")
    assert "optimizer.bin" in open_checkpoint(tmp_path / "toy").ignored
    tensors = load_file(tmp_path / "toy" / WEIGHTS)
    save_file({**tensors, "h.0.out": tensors["h.0.out"].to(torch.int8)}, tmp_path / "toy" / WEIGHTS)
    with pytest.raises(ConfigError, match="int8"):
        open_checkpoint(tmp_path / "toy")
    save_file({**tensors, "odd": torch.zeros(1)}, tmp_path / "toy" / WEIGHTS)
    with pytest.raises(LayoutError, match="odd"):
        open_checkpoint(tmp_path / "toy")
    save_file(tensors, tmp_path / "toy" / WEIGHTS)
    config = json.loads((tmp_path / "toy" / CONFIG).read_text())
    for change, message in (({"softcap": 1.0}, "softcap"), ({"bias": True}, "bias"), ({"n_layer": 10**9}, "n_layer")):
        (tmp_path / "toy" / CONFIG).write_text(json.dumps({**config, **change}))
        with pytest.raises(ConfigError, match=message):
            open_checkpoint(tmp_path / "toy")


def test_what_it_cannot_say_is_refused(toy, tmp_path):
    base, written = BASES["llama"].replace(kv_heads=6, group=1), []
    for name, spec in variants(base):
        try:
            plan = plan_for(checkpoint(spec, "llama"), Write(to="toy", verify=False, sync=False))
        except SurgeryError:
            continue
        execute(plan, tmp_path / str(len(written)))
        assert not spec.changes(open_checkpoint(tmp_path / str(len(written))).spec), name
        written.append(name)
    assert "" in written
    assert "norm_eps 0.0003" in written
    assert not any(name.startswith(("windows", "qkv_bias", "act")) for name in written)


def test_the_page_names_every_file():
    """What a newcomer has to touch, as it stands in the repository."""
    said = EXTENDING.read_text()
    for path in re.findall(r"`((?:surgery|tests|docs)/[\w./]+|README\.md)`", said):
        assert (EXTENDING.parent.parent / path).exists(), path
    needed = """surgery/formats/hf/families.py surgery/formats/hf/rows.py surgery/formats/registry.py tests/tiny.py
                tests/matrix.py tests/test_any_to_any.py docs/formats/ README.md"""
    for name in needed.split():
        assert f"`{name}`" in said, name

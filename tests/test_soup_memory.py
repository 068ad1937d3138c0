"""`--max-memory` holds for merges of zeros by eleven methods, however large a tensor: measured, not believed.

A process of its own merges two models whose embedding is the one large tensor.  Merges of tiny ones pay before for what
the budget does not count: imports, and what numba compiles; what they and later ones keep is counted.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 1 << 20
BUDGET = 64 * MIB
WIDTH = 1024
MERGES = {
    "linear": {"weight": 0.5}, "ties": {"weight": 1, "density": 0.5}, "della": {"weight": 1, "density": 0.5},
    "dare_ties": {"weight": 1, "density": 0.5}, "slerp": {}, "karcher": {}, "sce": {}, "arcee_fusion": {},
    "nuslerp": {"weight": 1}, "model_stock": {}, "breadcrumbs_ties": {"weight": 1},
}  # fmt: skip
SHARED = {"slerp": {"t": 0.5}, "sce": {"select_topk": 0.5}}
BASED = ("ties", "della", "dare_ties", "slerp", "sce", "arcee_fusion", "model_stock", "breadcrumbs_ties")
SCRIPT = """
import gc, json, sys
import surgery
from tests.held import held, most_held

first, *recipes = json.loads(sys.argv[1])
out, budget = sys.argv[2], int(sys.argv[3])

def merge(recipe, name):
    gc.collect()
    surgery.soup(recipe, f"{out}-{name}", max_memory=budget, sync=False, threads=2)

for i, recipe in enumerate(first):
    merge(recipe, f"first-{i}")
start = held()
print(json.dumps([most_held(lambda: merge(recipe, i), start) for i, recipe in enumerate(recipes)]))
"""


def model(folder: Path, rows: int, width: int = WIDTH) -> Path:
    """A Llama of one layer and so many tokens; the weights are holes in the file."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width, "vocab_size": rows,
              "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 8,
              "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
              "max_position_embeddings": 128, "rope_theta": 10000.0}  # fmt: skip
    layer = "model.layers.0."
    shapes = {"model.embed_tokens.weight": (rows, width), "model.norm.weight": (width,)}
    shapes |= {f"{layer}{n}_layernorm.weight": (width,) for n in ("input", "post_attention")}
    shapes |= {f"{layer}self_attn.{n}_proj.weight": (width, width) for n in "qkvo"}
    shapes |= {f"{layer}mlp.{n}_proj.weight": (256, width) for n in ("gate", "up")}
    shapes[f"{layer}mlp.down_proj.weight"] = (width, 256)
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return folder


def recipe(method: str, *models: Path) -> dict[str, object]:
    """The first model is the base of a method that has one; of two models, slerp takes it as a source, too."""
    based = {"base_model": str(models[0])} if method in BASED else {}
    own = {"parameters": MERGES[method]} if MERGES[method] else {}
    used = models[1:] if based and method != "slerp" else models
    more = {"parameters": SHARED[method]} if method in SHARED else {}
    merged = [{"model": str(m), **own} for m in used]
    return {"merge_method": method, "models": merged, "dtype": "bfloat16", **based, **more}


def measured(out: Path, first: list[dict[str, object]], recipes: dict[str, dict[str, object]]) -> dict[str, int]:
    """The most that each merge held, in bytes; `first` are done before and not measured."""
    every = json.dumps([first, *recipes.values()])
    done = subprocess.run([sys.executable, "-c", SCRIPT, every, str(out), str(BUDGET)],
                          capture_output=True, text=True, timeout=280)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(recipes, json.loads(done.stdout.splitlines()[-1]), strict=True))


def check(peaks: dict[str, int]) -> None:
    assert max(peaks.values()) <= BUDGET, {name: f"{peak / MIB:.0f} MiB" for name, peak in peaks.items()}


@pytest.mark.slow
def test_the_budget_holds_at_two_sizes(tmp_path: Path) -> None:
    tiny = [model(tmp_path / f"tiny-{x}", 64, 64) for x in "abc"]
    sizes = {rows: [model(tmp_path / f"{rows}-{x}", rows) for x in "abc"] for rows in (12000, 30000)}
    few = {m: 3 if m == "model_stock" else 2 for m in MERGES}
    recipes = {f"{m} of {rows} rows": recipe(m, *sizes[rows][: few[m]]) for m in MERGES for rows in (12000, 30000)}
    check(measured(tmp_path / "out", [recipe(m, *tiny[: few[m]]) for m in MERGES], recipes))


@pytest.mark.slow
def test_the_budget_holds_for_a_dozen_models(tmp_path: Path) -> None:
    """Chunks and blocks are smaller where there are more sources."""
    tiny = [model(tmp_path / f"tiny-{x}", 64, 64) for x in range(13)]
    many = [model(tmp_path / f"many-{x}", 12000) for x in range(13)]
    methods = [m for m in MERGES if m not in ("slerp", "nuslerp", "arcee_fusion")]  # of two models
    check(measured(tmp_path / "out", [recipe(m, *tiny) for m in methods], {m: recipe(m, *many) for m in methods}))

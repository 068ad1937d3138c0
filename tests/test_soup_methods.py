"""Every merge method against mergekit 0.1.5, through the same YAML: bit for bit, in its dtype and in fp32."""

from __future__ import annotations

import pytest
import torch

import surgery
from tests import merges

A, B, C = "a", "b", "c"


def several(*names, **parameters):
    return [{"model": n, "parameters": parameters} if parameters else {"model": n} for n in names]


def each(name, values):
    return [{"model": n, "parameters": {name: v}} for n, v in zip((A, B, C), values, strict=False)]


def task(method, shared=None, **own):
    pair = [{"model": B, "parameters": {"weight": 0.4, **own}}, {"model": C, "parameters": {"weight": 0.7, **own}}]
    return {"merge_method": method, "base_model": A, "models": pair, "parameters": shared or {}}


def based(method, **parameters):
    return {"merge_method": method, "base_model": A, "models": several(B, C), "parameters": parameters}


def pair(method, **parameters):
    return {"merge_method": method, "base_model": A, "models": several(A, B), "parameters": parameters}


# name -> the YAML.  Ties are broken in mergekit by unstable sorts; stable ones are put in their place (docs/soup.md)
CASES = {
    "linear": {"merge_method": "linear", "models": each("weight", (0.5, 0.3, 0.3))},
    "linear_sum": {"merge_method": "linear", "models": each("weight", (0.5, 0.3, -0.1)),
                   "parameters": {"normalize": False}},
    "linear_one": {"merge_method": "linear", "models": each("weight", (0.7,))},
    "passthrough": {"merge_method": "passthrough", "models": several(B)},
    "passthrough_scaled": {"merge_method": "passthrough", "models": several(B, scale=0.9)},
    "slerp": pair("slerp", t=0.3),
    "slerp_ends": pair("slerp", t=[0, 1]),
    "slerp_swapped": {**pair("slerp", t=0.25), "models": several(B, A)},
    "nuslerp": {"merge_method": "nuslerp", "models": each("weight", (0.4, 0.9))},
    "nuslerp_zero": {"merge_method": "nuslerp", "models": each("weight", (0.5, -0.5))},
    "nuslerp_base": {"merge_method": "nuslerp", "base_model": A, "models": several(B, C, weight=0.4)},
    "nuslerp_rows": {"merge_method": "nuslerp", "models": each("weight", (0.4, 0.9)),
                     "parameters": {"nuslerp_flatten": False}},
    "nuslerp_columns": {"merge_method": "nuslerp", "base_model": A, "models": several(B, C, weight=1),
                        "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True}},
    "multislerp": {"merge_method": "multislerp", "models": each("weight", (0.5, 0.3, 0.4))},
    "multislerp_base": {"merge_method": "multislerp", "base_model": A, "models": several(B, C, weight=0.5),
                        "parameters": {"normalize_weights": False, "eps": 1e-6}},
    "multislerp_one": {"merge_method": "multislerp", "base_model": A, "models": several(B, weight=0.5)},
    "karcher": {"merge_method": "karcher", "models": several(A, B, C)},
    "karcher_short": {"merge_method": "karcher", "models": several(A, B), "parameters": {"max_iter": 2, "tol": 1e-3}},
    "task_arithmetic": task("task_arithmetic", {"lambda": 0.7}),
    "task_arithmetic_mean": task("task_arithmetic", {"normalize": True}),
    "ties": task("ties", density=0.3),
    "ties_masked": task("ties", {"int8_mask": True, "rescale": True, "normalize": False, "lambda": 1.2}, density=0.6),
    "ties_whole": task("ties", density=1.0),
    "ties_nothing": task("ties", density=0.0),
    "breadcrumbs": task("breadcrumbs", density=0.3, gamma=0.05),
    "breadcrumbs_ties": task("breadcrumbs_ties", {"rescale": True}, density=0.5, gamma=0.02),
    "dare_whole": task("dare_ties", density=1.0),
    "della_whole": task("della_linear", density=1.0),
    "model_stock": based("model_stock"),
    "model_stock_rows": based("model_stock", filter_wise=True),
    "sce": based("sce"),
    "sce_topk": based("sce", select_topk=0.3, int8_mask=True),
    "sce_nothing": based("sce", select_topk=0.0),
    "nearswap": pair("nearswap", t=0.02),
    "arcee_fusion": pair("arcee_fusion"),
    "ram": based("ram", epsilon=0.02),
    "ramplus_tl": based("ramplus_tl", epsilon=0.02, r=0.2, alpha=0.3),
    "base_alone": {"merge_method": "task_arithmetic", "base_model": A, "models": several(A, weight=1)},
}  # fmt: skip
TIED = {"ties", "ties_masked", "breadcrumbs", "breadcrumbs_ties", "sce_topk"}
# mergekit writes these as fp32, whatever the dtype that it writes into the config; ours are rounded to that dtype
LEFT_WIDE = {"arcee_fusion", "ramplus_tl"}
MIXED = [
    "linear",
    "slerp",
    "nuslerp_columns",
    "ties",
    "breadcrumbs",
    "model_stock_rows",
    "sce_topk",
    "arcee_fusion",
    "karcher",
]


def named(config, folders):
    """The config with folders instead of a, b, c."""
    of = dict(zip((A, B, C), folders, strict=True))
    out = {**config, "models": [{**m, "model": of[m["model"]]} for m in config["models"]]}
    return {**out, "base_model": of[A]} if "base_model" in config else out


@pytest.fixture(scope="session")
def trio(tmp_path_factory):
    """trio("qwen2", "bfloat16"): three folders, made once."""
    made = {}

    def get(family, dtype):
        if (family, dtype) not in made:
            made[family, dtype] = merges.models(family, tmp_path_factory.mktemp("trio"), 3, dtype)
        return made[family, dtype]

    return get


def test_all_methods_of_mergekit_are_here():
    from mergekit.merge_methods.registry import registered_methods

    from surgery.merging.methods.registry import METHODS

    theirs = {
        m.spec.name: {p.name: p.default for p in m.spec.parameters if not p.required} for m in registered_methods()
    }
    assert theirs.keys() == METHODS.keys()
    for name, defaults in theirs.items():
        ours = {p.name: p.default for p in METHODS[name].parameters if not p.required}
        assert ours == defaults, name
        assert {p.name for p in METHODS[name].parameters} >= set(ours)


@pytest.mark.parametrize("name", CASES)
def test_in_the_dtype_of_the_models(name, trio, tmp_path):
    """bf16 with biases, tied embeddings and three query heads per group, every intermediate result rounded as there."""
    config = named(CASES[name], trio("qwen2", "bfloat16"))
    surgery.soup(config, tmp_path / "ours", arithmetic="mergekit", verify=False)
    with merges.ties_by_place():
        merges.mergekit(config, tmp_path / "theirs")
    cast = torch.bfloat16 if name in LEFT_WIDE else None
    assert merges.differences(tmp_path / "ours", tmp_path / "theirs", cast) == []


@pytest.mark.parametrize("name", CASES)
def test_in_fp32_rounded_once(name, trio, tmp_path):
    """The default arithmetic is mergekit's with dtype: float32."""
    config = {**named(CASES[name], trio("llama", "bfloat16")), "dtype": "float32", "out_dtype": "bfloat16"}
    surgery.soup({k: v for k, v in config.items() if "dtype" not in k}, tmp_path / "ours", verify=False)
    with merges.ties_by_place():
        merges.mergekit(config, tmp_path / "theirs")
    assert merges.differences(tmp_path / "ours", tmp_path / "theirs") == []


@pytest.mark.parametrize("name", sorted(TIED | {"linear", "slerp"}))
def test_without_ties_mergekit_is_taken_as_it_is(name, trio, tmp_path):
    """fp32 models whose differences are all distinct: no sort is patched."""
    config = named(CASES[name], trio("olmo2", "float32"))
    surgery.soup(config, tmp_path / "ours", verify=False)
    merges.mergekit(config, tmp_path / "theirs")
    assert merges.differences(tmp_path / "ours", tmp_path / "theirs") == []


@pytest.mark.parametrize("name", MIXED)
def test_experts_are_merged_stacked(name, trio, tmp_path):
    """Norms and thresholds are those of all experts of a layer at once, as transformers 5 and mergekit see them."""
    config = {**named(CASES[name], trio("mixtral", "bfloat16")), "dtype": "float32", "out_dtype": "bfloat16"}
    surgery.soup(config, tmp_path / "ours", verify=False)
    with merges.ties_by_place():
        merges.mergekit(config, tmp_path / "theirs")
    assert merges.differences(tmp_path / "ours", tmp_path / "theirs") == []

"""Every merge method by name.

    METHODS["ties"].run(inputs, {"weight": [0.5, 0.5], "density": [0.2, 0.2], "lambda": 1.0, ...})

Names, defaults and contracts are mergekit 0.1.5's (`merge_methods/registry.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from types import MappingProxyType

from surgery.merging.contract import Method, Parameter
from surgery.merging.methods.arcee_fusion import arcee_fusion
from surgery.merging.methods.karcher import karcher
from surgery.merging.methods.linear import linear, nearswap, passthrough
from surgery.merging.methods.model_stock import model_stock
from surgery.merging.methods.ram import ram, ramplus_tl
from surgery.merging.methods.sce import sce
from surgery.merging.methods.slerp import multislerp, nuslerp, slerp
from surgery.merging.methods.task_arithmetic import task_arithmetic


def _shared(name: str, kind: str, default: object) -> Parameter:
    return Parameter(name, kind, "all", default)


_WEIGHT = Parameter("weight", "float", "other", required=True)
_T = Parameter("t", "float", "all", required=True)


def _task_methods() -> Iterator[Method]:
    """Task vectors: which are thinned how, and whether signs have to agree."""
    table = (  # name, thinned by, signs agree, normalize, rescale
        ("task_arithmetic", "", False, False, False),
        ("ties", "magnitude", True, True, False),
        ("dare_ties", "random", True, False, True),
        ("dare_linear", "random", False, False, True),
        ("breadcrumbs", "outliers", False, False, False),
        ("breadcrumbs_ties", "outliers", True, False, False),
        ("della", "ranks", True, True, True),
        ("della_linear", "ranks", False, False, True),
    )
    for name, thinning, agree, normalize, rescale in table:
        more = {
            "outliers": (Parameter("gamma", "float", "other", 0.01),),
            "ranks": (Parameter("epsilon", "float", "other", 0.15),),
        }
        yield Method(
            name,
            partial(task_arithmetic, thinning=thinning, agree=agree),
            (
                _shared("int8_mask", "bool", False),
                _shared("normalize", "bool", normalize),
                _shared("rescale", "bool", rescale),
                _shared("lambda", "float", 1.0),
                _WEIGHT,
                Parameter("density", "float", "other", 1.0),
                *more.get(thinning, ()),
            ),
            base="required",
            random=thinning in ("random", "ranks"),
        )


_ALL = (
    Method("linear", linear,
           (Parameter("weight", "float", "input", required=True), _shared("normalize", "bool", True))),
    Method("passthrough", passthrough, (Parameter("scale", "float", "input"),), models=(1, 1)),
    Method("nearswap", nearswap, (_T,), base="required", models=(2, 2)),
    Method("ram", ram, (_shared("epsilon", "float", 1e-5),), base="required"),
    Method("ramplus_tl", ramplus_tl,
           (_shared("r", "float", 0.1), _shared("alpha", "float", 0.2), _shared("epsilon", "float", 1e-5)),
           base="required"),
    Method("slerp", slerp, (_T,), base="required", models=(2, 2)),
    Method("nuslerp", nuslerp,
           (_WEIGHT, _shared("nuslerp_row_wise", "bool", False), _shared("nuslerp_flatten", "bool", True)),
           base="optional", others=(2, 2)),
    Method("multislerp", multislerp,
           (_WEIGHT, _shared("normalize_weights", "bool", True), _shared("eps", "float", 1e-8)),
           base="optional", others=(1, None)),
    Method("karcher", karcher, (_shared("max_iter", "int", 10), _shared("tol", "float", 1e-5))),
    Method("model_stock", model_stock, (_shared("filter_wise", "bool", False),), base="required",
           models=(3, None)),
    Method("sce", sce, (_shared("int8_mask", "bool", False), _shared("select_topk", "float", 1.0)),
           base="required"),
    Method("arcee_fusion", arcee_fusion, base="required", models=(2, 2)),
    *_task_methods(),
)  # fmt: skip
METHODS: Mapping[str, Method] = MappingProxyType({m.name: m for m in _ALL})
# what may stand in any recipe, used by its method or not; embed_slerp is an old name of what `tokenizer` decides
PARAMETERS = frozenset({p.name for m in _ALL for p in m.parameters} | {"embed_slerp"})

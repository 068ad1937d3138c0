"""Every merge method by name: what it can be told, how many models it takes, and the function that does it.

    METHODS["ties"].run(inputs, {"weight": [0.5, 0.5], "density": [0.2, 0.2], "lambda": 1.0, ...})

A method is a plain function from `Inputs` and options to `Ready`: what to do with a block.  Names, defaults and
contracts are mergekit 0.1.5's (`merge_methods/registry.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from surgery.merging.engine.inputs import Inputs
from surgery.merging.engine.merged import Ready
from surgery.merging.methods import consensus, elementwise, fusion, spheres, tasks
from surgery.merging.settings import Parameter

Run = Callable[[Inputs, Mapping[str, Any]], Ready]


@dataclass(frozen=True)
class Method:
    """`base`: ignored, optional or required; `models` and `others` (than the base): how few and how many."""

    name: str
    run: Run
    parameters: tuple[Parameter, ...] = ()
    base: str = "ignored"
    models: tuple[int, int | None] = (1, None)
    others: tuple[int, int | None] = (0, None)
    random: bool = False

    def shared_names(self) -> tuple[str, ...]:
        """What may stand at the whole merge, a module or a slice: everything."""
        return tuple(p.name for p in self.parameters)

    def input_names(self) -> tuple[str, ...]:
        """What may stand at a model."""
        return tuple(p.name for p in self.parameters if p.scope != "all")

    def refuses(self, count: int, based: bool) -> str | None:
        """Why the method cannot take `count` models, of which one may be the base."""
        if self.base == "required" and not based:
            return "needs a base model"
        others = count - (based and self.base != "ignored")
        for n, (least, most), what in ((count, self.models, "models"), (others, self.others, "models beside the base")):
            if n < least or (most is not None and n > most):
                wanted = (
                    f"exactly {least}" if least == most else f"at least {least}" if n < least else f"at most {most}"
                )
                return f"takes {wanted} {what if wanted[-2:] != ' 1' else what.replace('models', 'model')}, not {n}"
        return None


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
            tasks.method(thinning, agree),
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
    Method("linear", elementwise.linear,
           (Parameter("weight", "float", "input", required=True), _shared("normalize", "bool", True))),
    Method("passthrough", elementwise.passthrough, (Parameter("scale", "float", "input"),), models=(1, 1)),
    Method("nearswap", elementwise.nearswap, (_T,), base="required", models=(2, 2)),
    Method("ram", elementwise.ram, (_shared("epsilon", "float", 1e-5),), base="required"),
    Method("ramplus_tl", elementwise.ramplus_tl,
           (_shared("r", "float", 0.1), _shared("alpha", "float", 0.2), _shared("epsilon", "float", 1e-5)),
           base="required"),
    Method("slerp", spheres.slerp, (_T,), base="required", models=(2, 2)),
    Method("nuslerp", spheres.nuslerp,
           (_WEIGHT, _shared("nuslerp_row_wise", "bool", False), _shared("nuslerp_flatten", "bool", True)),
           base="optional", others=(2, 2)),
    Method("multislerp", spheres.multislerp,
           (_WEIGHT, _shared("normalize_weights", "bool", True), _shared("eps", "float", 1e-8)),
           base="optional", others=(1, None)),
    Method("karcher", spheres.karcher, (_shared("max_iter", "int", 10), _shared("tol", "float", 1e-5))),
    Method("model_stock", consensus.model_stock, (_shared("filter_wise", "bool", False),), base="required",
           models=(3, None)),
    Method("sce", consensus.sce, (_shared("int8_mask", "bool", False), _shared("select_topk", "float", 1.0)),
           base="required"),
    Method("arcee_fusion", fusion.arcee_fusion, base="required", models=(2, 2)),
    *_task_methods(),
)  # fmt: skip
METHODS: Mapping[str, Method] = MappingProxyType({m.name: m for m in _ALL})

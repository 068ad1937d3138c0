"""The keys by which Hugging Face's mixture-of-experts families say what no renaming can: as data, both ways.

    read_moe(family, keys, fields)      # moe_layers, shared width ... into the fields of Spec
    write_moe(family, spec)                              # {"mlp_only_layers": [0], "n_shared_experts": 1, ...}

`Family.sparse` names how a family lists its layers with experts, `Family.shared` the key of the shared expert's width
(in rows, or in experts), `Family.fixed` keys of which one value alone is understood.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from surgery.errors import ConfigError, show
from surgery.formats.hf.families import COUNTED, Family
from surgery.formats.keys import Keys
from surgery.model.spec import Spec

Json = dict[str, object]


def read_moe(family: Family, keys: Keys, fields: Json) -> Json:
    """Further fields of the Spec.  `fields` are those read so far.  Raises ConfigError."""
    out: Json = {}
    if family.sparse:
        layers = keys.integer("num_hidden_layers")
        sparse = SPARSE[family.sparse][0](keys, layers)
        out["moe_layers"] = () if len(sparse) == layers else sparse
        if not sparse:
            raise ConfigError("no layer has experts", file=keys.file, hint="it is a dense model of another family")
    if family.shared:
        key, default = family.shared
        size = _number(keys, key, default)
        out["shared_ffn"] = size * int(fields["expert_ffn"]) if key in COUNTED else size  # type: ignore[call-overload]
    if "use_qk_norm" in family.switches:
        out["qk_norm"] = "head" if keys.get("use_qk_norm") else ""
    for key, (wanted, absent) in family.fixed.items():
        value = keys.config.get(key)
        value = absent if value is None else value
        if type(value) not in (int, float, bool) or value != wanted:
            raise ConfigError(f"{key} is {show(value)}; only {wanted!r} is understood", file=keys.file,
                              hint=f"a {family.model_type} with another value is not read here, not even to be copied: "
                                   "use transformers itself for it")  # fmt: skip
    return out


def write_moe(family: Family, spec: Spec) -> Json:
    """The keys of a config that `read_moe` reads."""
    out: Json = {}
    if family.sparse:
        out |= SPARSE[family.sparse][1](spec)
    if family.shared:
        key, _ = family.shared
        out[key] = -(-spec.shared_ffn // max(spec.expert_ffn, 1)) if key in COUNTED else spec.shared_ffn
    if "use_qk_norm" in family.switches:
        out["use_qk_norm"] = spec.qk_norm == "head"
    out |= {key: wanted for key, (wanted, _) in family.fixed.items()}
    return out


def _number(keys: Keys, key: str, default: int, least: int = 0) -> int:
    found = keys.maybe_integer(key, least)
    return default if found is None else found


# ------------------------------------------------------------------------------- which layers have experts, both ways


def _read_steps(keys: Keys, layers: int) -> tuple[int, ...]:
    """Every decoder_sparse_step-th layer but the mlp_only_layers."""
    step, dense = _number(keys, "decoder_sparse_step", 1), keys.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(i) is not int for i in dense):
        raise ConfigError("mlp_only_layers is no list of layers", file=keys.file)
    without = set(dense)
    return tuple(i for i in range(layers) if i not in without and step and (i + 1) % step == 0)


def _write_steps(spec: Spec) -> Json:
    return {"decoder_sparse_step": 1, "mlp_only_layers": [i for i in range(spec.layers) if not spec.is_moe(i)]}


def _read_first(keys: Keys, layers: int) -> tuple[int, ...]:
    """All but the first so many."""
    return tuple(range(_number(keys, "first_k_dense_replace", 1), layers))


def _write_first(spec: Spec) -> Json:
    return {"first_k_dense_replace": min((i for i in range(spec.layers) if spec.is_moe(i)), default=spec.layers)}


def _read_range(keys: Keys, layers: int) -> tuple[int, ...]:
    """Every so manyth layer between two, both of them included."""
    first, step = _number(keys, "moe_layer_start_index", 1), _number(keys, "moe_layer_interval", 1, 1)
    last = _number(keys, "moe_layer_end_index", -1, -1)
    last = layers - 1 if last == -1 else last
    return tuple(i for i in range(layers) if (i + 1) % step == 0 and first <= i <= last)


def _write_range(spec: Spec) -> Json:
    sparse = [i for i in range(spec.layers) if spec.is_moe(i)]
    ends = (min(sparse), max(sparse)) if sparse else (0, -1)
    return {"moe_layer_start_index": ends[0], "moe_layer_end_index": ends[1], "moe_layer_interval": 1}


SPARSE: Mapping[str, tuple[Callable[[Keys, int], tuple[int, ...]], Callable[[Spec], Json]]] = {
    "steps": (_read_steps, _write_steps),
    "first": (_read_first, _write_first),
    "range": (_read_range, _write_range),
}

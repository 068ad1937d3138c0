"""Spec -> the YAML configuration with which a release of GPT-NeoX builds the model.

    config = write_config(spec, RELEASES["2024-11"], tp=2, pp=1, multiple=128, dtype="bfloat16")
    to_yaml(config)                                     # as the files of GPT-NeoX look: JSON that YAML reads

Whether GPT-NeoX can hold the model shows when the configuration is read back; `refuse` knows what single releases
cannot compute whatever their configuration says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from surgery.errors import ConfigError
from surgery.formats.keys import write
from surgery.formats.neox.config import TABLE, read_config
from surgery.formats.neox.releases import RELEASES, Evidence, Release, ffn_width
from surgery.model.spec import Spec

Json = dict[str, object]
_PRECISION = {"float32": "fp32", "float16": "fp16", "bfloat16": "bfloat16"}
_GATED = {"silu": "swiglu", "gelu": "geglu", "relu": "reglu"}
_PLAIN = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu", "relu": "relu"}


def spelling_of_mlp(spec: Spec, release: Release) -> str:
    """How a release names the tensors of this mlp: linear, dense or w."""
    if release.mlp == "linear":
        return "linear"
    return "w" if spec.glu else "dense"


def write_config(spec: Spec, release: Release, *, tp: int, pp: int, multiple: int, dtype: str) -> Json:
    """The keys that say what the model is, or the one that comes nearest."""
    return {
        "pipe_parallel_size": pp, "model_parallel_size": tp, **write(TABLE, spec), **_heads(spec, release),
        **_mlp(spec, release), "seq_length": spec.context or spec.learned_positions,
        "max_position_embeddings": spec.context or spec.learned_positions, "output_layer_parallelism": "column",
        "make_vocab_size_divisible_by": multiple, "precision": _PRECISION.get(dtype, "fp32"),
    }  # fmt: skip


def shown(spec: Spec, release: Release) -> Evidence:
    """What the tensors of the model will show."""
    rows = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
    return Evidence(layers=spec.layers, mlp=spelling_of_mlp(spec, release), gated=spec.glu, vocab=spec.vocab,
                    ffn=spec.ffn, qkv_rows=rows, qkv_bias=spec.qkv_bias, o_bias=spec.o_bias, mlp_bias=spec.mlp_bias,
                    head=not spec.tied, positions=spec.learned_positions, mark=release.name)  # fmt: skip


def refuse(spec: Spec, release: Release) -> None:
    """Raise ConfigError naming what the code of a release would not make of its configuration."""
    if found := _problems(spec, release):
        raise ConfigError(f"{program(release)} cannot hold this {spec.family}: it has {', '.join(found)}",
                          hint=hint(spec, release))  # fmt: skip


def _problems(spec: Spec, release: Release) -> list[str]:
    said, mlp = {"intermediate_size": _said(spec, release)}, spelling_of_mlp(spec, release)
    width = ffn_width(said, release.ffn, mlp, spec.glu, spec.width)
    problems = {
        "LayerNorm without weights (since 2025 only)": spec.norm == "none" and release.name != "2024-11",
        "biases for queries, keys and values only": spec.qkv_bias != spec.o_bias,
        "a gated mlp with biases": spec.glu and spec.mlp_bias and release.mlp != "linear",
        "an mlp without biases that is not gated (GPT-NeoX adds one always)": not spec.glu and not spec.mlp_bias,
        f"{spec.kv_heads} key/value heads for {spec.heads} heads": spec.group > 1 and not release.gqa,
        f"heads of width {spec.head_dim} that {spec.group} queries cannot share evenly": spec.group > 1
        and release.gqa == "B" and spec.head_dim % spec.group > 0,
        "sliding windows": any(spec.windows) and release.name in ("llemma", "2023-05"),
        f"an ffn width of {spec.ffn} (this release makes {width} of a model width of {spec.width})": width != spec.ffn
        and not spec.experts,
    }  # fmt: skip
    return [name for name, is_so in problems.items() if is_so]


def hint(spec: Spec, release: Release) -> str | None:
    """Which other releases hold the model; None if none does."""
    fit = [name for name, other in RELEASES.items() if other is not release and _holds(spec, other)]
    return f"another release holds it: -O release={' or '.join(fit)}" if fit else None


def _holds(spec: Spec, release: Release) -> bool:
    try:
        config = write_config(spec, release, tp=1, pp=1, multiple=1, dtype="float32")
        back = read_config(config, "its config", shown(spec, release)).spec
    except ConfigError:
        return False
    return not _problems(spec, release) and not spec.changes(back)


def program(release: Release) -> str:
    return f"GPT-NeoX {release.name} ({release.when})"


def _heads(spec: Spec, release: Release) -> Json:
    if spec.group == 1:
        return {}
    grouped: Json = {"num_kv_heads": spec.kv_heads}
    return grouped | ({"attention_type": "groupedquery"} if release.name == "llemma" else {})


def _said(spec: Spec, release: Release) -> int | None:
    """intermediate_size as the release wants it; None where it takes none."""
    if release.ffn == "fixed" or spelling_of_mlp(spec, release) == "dense":
        return None
    return 3 * spec.ffn if spec.glu and release.ffn == "third" else spec.ffn


def _mlp(spec: Spec, release: Release) -> Json:
    config: Json = {}
    if release.mlp == "linear":
        config["activation"] = (_GATED if spec.glu else _PLAIN).get(spec.act, spec.act)
        config["use_bias_in_mlp"] = spec.mlp_bias
    else:
        config["activation"] = _PLAIN.get(spec.act, spec.act)
        config["mlp_type"] = "llama" if spec.glu else "regular"
    if not spec.glu:
        config["bias_gelu_fusion"] = spec.act == "gelu_tanh"
    said = _said(spec, release)
    return config | ({"intermediate_size": said} if said is not None else {})


# ------------------------------------------------------------------------------------------------------------- bytes


def vocab_multiple(rows: int, tp: int, tokens: int | None) -> int:
    """make_vocab_size_divisible_by, so that GPT-NeoX pads its tokenizer's vocabulary to exactly the rows there are.

    It rounds the tokens up to a multiple of this number times tp.  128, its default, where that fits; 128 also where
    the rows do not divide among the ranks and have to be padded.
    """
    if rows % tp:
        return 128
    for multiple in (128, 64, 32, 16, 8, 4, 2, 1):
        if rows % (multiple * tp) == 0 and tokens is not None and rows - multiple * tp < tokens <= rows:
            return multiple
    return rows // tp


def to_yaml(config: Mapping[str, object]) -> bytes:
    """JSON that YAML 1.1 reads as it is meant: PyYAML takes 1e-05 for text, but 1.0e-05 for a number."""
    lines = ",\n".join(f"  {json.dumps(key)}: {_value(value)}" for key, value in config.items())
    return f"{{\n{lines}\n}}\n".encode()


def _value(value: object) -> str:
    if isinstance(value, float):
        text = repr(value)
        return text.replace("e", ".0e") if "e" in text and "." not in text else text
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(k))}: {_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value)

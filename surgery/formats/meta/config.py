"""Meta's `params.json` <-> Spec.

    spec, notes = read_params({"dim": 4096, ...}, "params.json", Evidence(vocab=32000, ffn=11008, ...))

params.json says less than a model needs, and its defaults differ by generation: what the shapes show is taken from
the shapes, what must be guessed is guessed by stated rules and named in the notes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgery.errors import ConfigError, show
from surgery.formats.keys import Entry, Key, Keys, Pair, read, write
from surgery.formats.unknown import Unknown
from surgery.model.spec import Rope, Spec

LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_INERT = ("max_batch_size", "max_seq_len", "flash", "lora_args", "quantization_args", "model_parallel_size",
          "multiple_of", "ffn_dim_multiplier", "hidden_dim", "rope_scaling_factor",
          "rope_high_freq_factor")  # fmt: skip
_ABSENT = {"n_kv_heads": None, "head_dim": None, "vocab_size": None, "rope_theta": None, "use_scaled_rope": False,
           "rope_scaling_factor": None, "rope_high_freq_factor": None, "sliding_window": None}  # fmt: skip


def _read_heads(keys: Keys) -> dict[str, Any]:
    dim, heads = keys.integer("dim"), keys.integer("n_heads")
    groups, said = keys.maybe_integer("n_kv_heads") or heads, keys.maybe_integer("head_dim")
    width = said or dim // heads
    if heads % groups or width % 2 or (said is None and dim % heads):
        raise ConfigError(f"dim {dim}, {heads} heads and {groups} key/value heads do not fit together", file=keys.file)
    return {"kv_heads": groups, "group": heads // groups, "head_dim": width}


def _write_heads(spec: Spec) -> dict[str, Any]:
    return {"n_heads": spec.heads, "n_kv_heads": spec.kv_heads}


TABLE: tuple[Entry, ...] = (
    Key("dim", "width"), Key("n_layers", "layers"), Pair(_read_heads, _write_heads), Key("norm_eps", "norm_eps", 1e-5),
)  # fmt: skip


@dataclass(frozen=True)
class Evidence:
    """What the tensors' shapes say: rows of the vocabulary, ffn width, the embedding's cut, tied or not; and whether
    the tokenizer beside them is a rank file of tiktoken."""

    vocab: int
    ffn: int
    embedding: str
    tied: bool
    tiktoken: bool = False


def read_params(
    params: Mapping[str, object],
    file: str,
    evidence: Evidence,
    *,
    rope_factor: float | None = None,
    positions: float | None = None,
) -> tuple[Spec, list[str]]:
    """The Spec and notes on what was guessed.  Raises ConfigError on values that make no sense."""
    keys = Keys(params, file, absent=_ABSENT, nulls=True)
    fields = read(TABLE, keys)
    vocab, dim = keys.get("vocab_size"), fields["width"]
    if vocab not in (None, -1, evidence.vocab):
        raise ConfigError(f"vocab_size is {show(vocab)}, but the embedding has {evidence.vocab} rows", file=file)
    llama3 = evidence.tiktoken or (evidence.embedding == "vocab" and evidence.vocab >= 100_000)
    notes, base = _check_ffn(params, dim, evidence.ffn), keys.maybe_real("rope_theta")
    if base is None:
        base = 500000.0 if llama3 else 10000.0
        notes.append(
            f"params.json does not say rope_theta: {base:g}, as {'Llama 3' if llama3 else 'Llama 1 and 2'} take it"
        )
    scaling, more = _scaling(keys, evidence.tied, rope_factor)
    window = keys.maybe_integer("sliding_window") or 0
    length = int(positions) if positions else _positions(bool(scaling), base, fields["norm_eps"], llama3, window)
    if window:
        more.append(f"a Mistral: each token sees {window} with itself, as transformers reads its sliding_window")
    if not positions:
        more.append(f"params.json does not say the longest context: {length} (-O max_positions=N)")
    spec = Spec(family="mistral" if window else "llama", windows=(window,) * fields["layers"] if window else (),
                vocab=evidence.vocab, ffn=evidence.ffn, rope=Rope(base, 1.0, scaling), tied=evidence.tied,
                context=length, **fields)  # fmt: skip
    notes += [Unknown(key, value) for key, value in keys.unknown(_INERT).items()]
    return spec, notes + keys.note("the reference code") + more


def _scaling(keys: Keys, tied: bool, factor: float | None) -> tuple[dict[str, object], list[str]]:
    """The Llama 3.1 rope scaling; its factor is in no public params.json, so a default has to be named."""
    if not keys.flag("use_scaled_rope"):
        if factor is not None:
            raise ConfigError("-O rope_factor is given, but params.json does not scale the rope", file=keys.file)
        return {}, []
    stated = keys.maybe_real("rope_scaling_factor")
    notes = []
    if factor is None and stated is None:
        factor = 32.0 if tied else 8.0
        which = "tied, so Llama 3.2" if tied else "not tied, so Llama 3.1 or 3.3"
        notes.append(f"params.json does not say the rope's factor: {factor:g} ({which}; -O rope_factor=N)")
    numbers = dict(LLAMA3_ROPE)
    high = keys.maybe_real("rope_high_freq_factor")
    if high is not None:
        numbers["high_freq_factor"] = high
    return {"type": "llama3", "factor": factor or stated, **numbers}, notes


def _positions(scaled: bool, base: float, eps: float, llama3: bool, window: int) -> int:
    if window:
        return 32768  # Mistral 7B v0.1
    if scaled:
        return 131072
    if llama3 or base == 500000.0:
        return 8192
    if base == 1e6:
        return 16384  # Code Llama
    return 2048 if eps == 1e-6 else 4096


def ffn_width(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """The width that the reference code computes from params.json."""
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


def _check_ffn(params: Mapping[str, object], dim: int, width: int) -> list[str]:
    multiple, multiplier = params.get("multiple_of", 256), params.get("ffn_dim_multiplier")
    if (stated := params.get("hidden_dim")) is not None:  # so Mistral's releases say it
        return [] if stated == width else [f"hidden_dim is {show(stated)}, the tensors have {width}: taken from these"]
    numbers = type(multiple) is int and multiple > 0 and type(multiplier) in (int, float, type(None))
    if not numbers or not 0 < (1 if multiplier is None else multiplier) < 1e6:  # type: ignore[operator]
        return ["multiple_of or ffn_dim_multiplier make no sense; the ffn width is taken from the tensors"]
    said = ffn_width(dim, multiple, multiplier)  # type: ignore[arg-type]
    if said == width:
        return []
    return [f"params.json implies an ffn width of {said}, the tensors have {width}: taken from the tensors"]


# ------------------------------------------------------------------------------------------------------- writing


def is_llama3(spec: Spec) -> bool:
    """Whether a model looks like Llama 3 or later, whose loader cuts the embedding along the vocabulary."""
    scaled = spec.rope is not None and bool(spec.rope.scaling)
    return scaled or spec.tied or spec.vocab >= 100_000 or (spec.rope is not None and spec.rope.base == 500000.0)


def write_params(spec: Spec, factor: float | None) -> tuple[dict[str, object], list[str]]:
    """params.json of the model that comes nearest, with notes on what it cannot say."""
    rope = spec.rope or Rope()
    multiple, multiplier = ffn_numbers(spec.width, spec.ffn)
    params: dict[str, object] = {**write(TABLE, spec), "vocab_size": spec.vocab, "multiple_of": multiple}
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    params["rope_theta"] = rope.base
    notes = []
    if rope.scaling.get("type") == "llama3":
        params["use_scaled_rope"] = True
        own = rope.scaling["factor"]
        if factor is not None and factor != own:
            raise ConfigError(f"-O rope_factor={factor:g}, but the model's own factor is {own}")
        if own != (32.0 if spec.tied else 8.0):
            params["rope_scaling_factor"] = own
        if own != 8:
            notes.append(
                f"the rope's factor is {own}; reference code that knows no rope_scaling_factor computes with 8"
            )
    if spec.context:
        notes.append(f"params.json cannot say the longest context ({spec.context})")
    return params, notes


def ffn_numbers(dim: int, width: int) -> tuple[int, float | None]:
    """multiple_of and ffn_dim_multiplier that give an ffn width: those of a release if one fits, else fresh ones."""
    if not width:  # no dense layer
        return 256, None
    for multiple in (256, 1024, 4096, 512, 128, 64, 32):
        for multiplier in (None, 1.3, 1.5, 1.0):
            if ffn_width(dim, multiple, multiplier) == width:
                return multiple, multiplier
    multiple = min(width & -width, 256)
    multiplier = (width + 0.5) / int(2 * (4 * dim) / 3)  # truncated to the width itself
    if ffn_width(dim, multiple, multiplier) != width:
        raise ConfigError(f"no multiple_of and ffn_dim_multiplier give an ffn width of {width} for a dim of {dim}")
    return multiple, multiplier


def to_json(params: Mapping[str, object]) -> bytes:
    return (json.dumps(params, indent=2) + "\n").encode()

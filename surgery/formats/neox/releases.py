"""GPT-NeoX's releases: how each names and packs its tensors, and which of them wrote a checkpoint.

    RELEASES["2024-03"].gqa                                          # "B"
    choose_qkv(config, evidence, spec, file, qkv="auto", release="auto")      # ("C", [])

What the tensors show is `Evidence`; where it leaves several readings of grouped queries, nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from surgery.errors import AmbiguousError, ConfigError
from surgery.model.spec import Spec

Config = Mapping[str, object]


@dataclass(frozen=True)
class Release:
    """A stretch of GPT-NeoX's history.  `mlp`: how the mlp's tensors are named (w: w1, w2, w3 and dense_h_to_4h;
    linear: linear1, linear2); `gqa`: how grouped queries are packed, "" if they are unknown; `buffer`: inv_freq is
    stored; `ffn`: the ffn width is fixed, is `intermediate_size`, or a third of it where gated; `keys`: added since."""

    name: str
    when: str
    mlp: str
    gqa: str
    buffer: bool
    ffn: str


RELEASES: Mapping[str, Release] = MappingProxyType(
    {
        r.name: r
        for r in (
            Release("llemma", "branch llemma, 2023", "w", "B", True, "fixed"),
            Release("2023-05", "main, 2023-05 to 2024-02-21", "w", "", True, "fixed"),
            Release("2024-03", "main, 2024-03 to 2024-09-05", "w", "B", False, "plain"),
            Release("2024-09", "main, 2024-09-06 to 2024-11-13", "linear", "B", False, "third"),
            Release("2024-11", "main since 2024-11-14", "linear", "C", False, "third"),
        )
    }
)
NEWEST = "2024-11"


@dataclass(frozen=True)
class Evidence:
    """What the tensors show: layers, how the mlp is named (w, dense, linear), sizes over all ranks, which there are.

    `mark` is the release that this program noted when it wrote the checkpoint; `buffer` the dtype of inv_freq;
    `prefix` of all names, and `head_cut`, the axis of the output layer that the `ranks` share, are as in `Spelling`.
    """

    layers: int
    mlp: str
    gated: bool
    vocab: int
    ffn: int
    qkv_rows: int
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    head: bool
    positions: int = 0
    buffer: str = ""
    mark: str = ""
    dtype: str = ""
    ranks: int = 1
    prefix: str = ""
    head_cut: str = "v"


def choose_qkv(
    config: Config, found: Evidence, spec: Spec, file: str, *, qkv: str, release: str
) -> tuple[str, list[str]]:
    """The layout of query_key_value, and a note where an option decided it.

    A and B are per query head q, then its share of k and of v (B is A with fewer k and v than q); C is, per rank, all
    q, all k, all v.  Raises AmbiguousError where nothing in the files tells B from C.
    """
    grouped = spec.group > 1
    if qkv != "auto":
        if qkv == "A" and grouped:
            raise ConfigError(f"-O qkv=A, but {spec.heads} heads share {spec.kv_heads} key/value heads", file=file)
        return ("A" if qkv == "B" and not grouped else qkv), [f"query_key_value is read in layout {qkv}, as -O says"]
    if not grouped:
        return "A", []
    if config.get("attention_type") is not None or found.mlp != "linear":
        return "B", []
    if spec.head_dim % spec.group:
        return "C", []  # layout B gives every query head a whole number of rows of k and v
    if found.mark:
        return RELEASES[found.mark].gqa, []
    if release in RELEASES and RELEASES[release].mlp == "linear":
        layout = RELEASES[release].gqa
        return layout, [f"query_key_value is read in layout {layout}, as -O release={release} says"]
    readings = [f"as {RELEASES[name].when} packs them (-O release={name})" for name in ("2024-09", "2024-11")]
    raise AmbiguousError(
        f"grouped queries, keys and values can be read in two ways that the files do not tell apart: {readings[0]}, "
        f"each query head with its share of k and v, or {readings[1]}, all q, all k, all v",
        file=file,
        hint="say which with -O release=2024-09 or -O release=2024-11; the wrong one gives a model that talks "
        "nonsense, and `surgery inspect PATH --try-text FILE` measures which that is",
        readings=({"release": "2024-09"}, {"release": "2024-11"}),
    )


def writer(found: Evidence, layout: str, spec: Spec, config: Config) -> str:
    """The release that wrote the tensors, as far as it can be known."""
    if found.mark:
        return found.mark
    if "attention_type" in config:
        return "llemma"
    fits = [
        r.name
        for r in RELEASES.values()
        if (r.mlp == "linear") == (found.mlp == "linear") and (spec.group == 1 or r.gqa == layout)
        and not (found.buffer and not r.buffer)
    ]  # fmt: skip
    return " or ".join(fits) or "unknown"


def ffn_width(config: Config, ffn: str, mlp: str, gated: bool, width: int) -> int | None:
    """The ffn width that a release makes of a configuration; None where it makes none."""
    said, factor, multiple = (
        _sane(config.get(k)) for k in ("intermediate_size", "expansion_factor", "mlp_multiple_of")
    )
    if ffn == "third":
        total = int(said or (factor or 4) * width)
        inner, outer = (int(total * 2 / 3) // 2, int(total * 2 / 3)) if gated else (total, total)
        step = int(multiple or 1) or 1
        inner, outer = -(-inner // step) * step, -(-outer // (2 * step)) * 2 * step
        return inner if outer == (2 * inner if gated else inner) else None
    if mlp == "dense":
        return 2 * width if gated else 4 * width
    if ffn == "plain" and said is not None:
        return int(said)
    return -(-int(2 * width * 4 / 3) // 256) * 256


def _sane(value: object) -> float | None:
    return value if type(value) in (int, float) and 0 < value < 1 << 31 else None  # type: ignore[operator,return-value]

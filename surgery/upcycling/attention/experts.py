"""Attention as a mixture: groups of heads are experts, written as a Hugging Face model with code of its own.

    made = with_attention(checkpoint, Attention(experts=4, top_k=2))        # of a dense model, or of a Mixtral
    output = plan(made, ONE_RANK, {"shard_size": "5GB"})                    # config, weights and the modeling file

No family of transformers has such layers, so the folder carries `modeling_attention_moe.py` and is loaded with
`trust_remote_code=True`; what it computes is told there.  The router's weights sum to one and are multiplied by
sqrt(experts x top_k): all of the groups, weighted alike, then count once each, which is the dense attention; of fewer,
the variance stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.containers import open_tensors
from surgery.containers.output import OutputFile, text_file
from surgery.containers.text import read_json
from surgery.errors import ConfigError, UsageError, show
from surgery.formats.base import Checkpoint, Format, Option, Options, Output, Place
from surgery.formats.hf import format as hf
from surgery.formats.hf.config import read_config, write_config
from surgery.formats.hf.files import to_json, weight_files
from surgery.formats.hf.table import table
from surgery.formats.table import Dialect, Rank, Stored, Topology, gather, spread
from surgery.model.spec import Spec
from surgery.tensors.lazy import Fill, Lazy
from surgery.tensors.random import Random
from surgery.tokenizer import Carried
from surgery.units import parse_size

MODELING = "modeling_attention_moe"
ARCHITECTURE = "AttentionMoeForCausalLM"
MODEL_TYPE = "attention_moe"
STD = 0.02
ROPES = ("linear", "llama3")
# what the modeling file takes for granted
PLAIN: Mapping[str, object] = {
    "norm": "rms", "norm_at": "pre", "qk_norm": "", "o_bias": False, "clip_qkv": None, "glu": True, "mlp_bias": False,
    "parallel": False, "windows": (), "learned_positions": 0, "rope_local": None, "shared_ffn": 0, "moe_layers": (),
    "router_bias": False,
    "router_score": "softmax", "router_scale": None,
}  # fmt: skip
# keys that have the same name and meaning as in other families
KEPT = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
        "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "torch_dtype", "bos_token_id",
        "eos_token_id", "pad_token_id")  # fmt: skip
_ROUTER = "layers.{}.attn.router"
_STORED = "model.layers.{}.self_attn.router.weight"


@dataclass(frozen=True)
class Attention:
    """How many groups of heads there are, how many of them a token uses, and the router's standard deviation."""

    experts: int
    top_k: int
    std: float = STD
    seed: int = 0

    @property
    def scale(self) -> float:
        return math.sqrt(self.experts * self.top_k)

    @property
    def losses(self) -> tuple[str, ...]:
        if self.top_k == self.experts:
            return ()
        return (f"attention: a token uses {self.top_k} of {self.experts} groups of heads",)


def check(spec: Spec, wanted: Attention) -> None:
    """Raise UsageError if the groups do not fit the heads, ConfigError if the modeling file cannot hold the model."""
    if not 0 < wanted.top_k <= wanted.experts:
        raise UsageError(f"--attention-top-k {wanted.top_k} of --attention-experts {wanted.experts}: choose fewer")
    if spec.kv_heads % wanted.experts:
        raise UsageError(
            f"--attention-experts {wanted.experts} do not divide {spec.kv_heads} key/value heads",
            hint=f"choose from {', '.join(str(d) for d in range(1, spec.kv_heads + 1) if spec.kv_heads % d == 0)}",
        )
    odd = [name for name, value in PLAIN.items() if getattr(spec, name) != value]
    if spec.rope is None or spec.rope.fraction != 1 or spec.rope.scaling.get("type", "linear") not in ROPES:
        odd.append("rope")
    if spec.experts and not spec.top_k_renormalised:
        odd.append("top_k_renormalised")
    if spec.qkv_bias and (spec.experts or spec.width != spec.heads * spec.head_dim):
        odd.append("qkv_bias")
    if odd:
        raise ConfigError(
            f"attention experts are for models like Llama; this {spec.family} differs in {', '.join(odd)}",
            hint="leave out --attention-experts",
        )


def with_attention(source: Checkpoint, wanted: Attention) -> Checkpoint:
    """The checkpoint with a router beside every attention: zeros where all groups are chosen, as the dense model.

    Raises UsageError or ConfigError.
    """
    check(source.spec, wanted)
    spec = source.spec
    shape = (wanted.experts, spec.width)
    routers: dict[str, Lazy] = {}
    for layer in range(spec.layers):
        name, kind = _ROUTER.format(layer), source.parts[f"layers.{layer}.attn.q"].dtype
        whole = wanted.top_k == wanted.experts
        routers[name] = Fill(shape, kind) if whole else Random(shape, kind, name, wanted.seed, std=wanted.std)
    details = {**source.details, "attention": wanted}
    return replace(source, parts={**source.parts, **routers}, details=details)


# ------------------------------------------------------------------------------------------------------- writing


def _base(spec: Spec) -> str:
    """The family whose names the tensors have."""
    return "mixtral" if spec.experts else "qwen2" if spec.qkv_bias else "llama"


def _table(spec: Spec) -> Dialect:
    return table(_base(spec))


def config_of(spec: Spec, wanted: Attention, facts: Mapping[str, object], kind: str) -> dict[str, Any]:
    """config.json: the modeling file's keys; the rotary scaling under names that transformers leaves alone."""
    assert spec.rope is not None
    base = write_config(spec, facts, kind, _base(spec))
    scaling = {("rope_type" if k == "type" else k): v for k, v in spec.rope.scaling.items()}
    return {
        "architectures": [ARCHITECTURE],
        "auto_map": {
            "AutoConfig": f"{MODELING}.AttentionMoeConfig",
            "AutoModelForCausalLM": f"{MODELING}.{ARCHITECTURE}",
        },
        "model_type": MODEL_TYPE,
        **{k: base[k] for k in KEPT if k in base},
        "intermediate_size": spec.expert_ffn if spec.experts else spec.ffn,
        "head_dim": spec.head_dim,
        "attention_bias": spec.qkv_bias,
        "rotary_base": spec.rope.base,
        "rotary_scaling": scaling,
        "num_local_experts": spec.experts,
        "num_experts_per_tok": spec.top_k,
        "num_attention_experts": wanted.experts,
        "num_attention_experts_per_tok": wanted.top_k,
        "attention_scale": wanted.scale,
    }


def plan(checkpoint: Checkpoint, topology: Topology, options: Options) -> Output:
    """The folder's files."""
    spec, wanted = checkpoint.spec, checkpoint.details["attention"]
    assert isinstance(wanted, Attention)
    found = checkpoint.tokenizer
    facts = {**(found.ids() if found else {}), **checkpoint.facts}
    config = config_of(spec, wanted, facts, checkpoint.dtype)
    tokens = hf.tokens(found, checkpoint) if found else Carried((), ())
    stored = spread(_table(spec), checkpoint.parts, spec, topology)[Rank()]
    routers = {_STORED.format(i): Stored(checkpoint.parts[_ROUTER.format(i)]) for i in range(spec.layers)}
    files: list[OutputFile] = [
        text_file("config.json", to_json(config)),
        text_file(f"{MODELING}.py", modeling()),
        *weight_files({**stored, **routers}, parse_size(options["shard_size"])),
        *tokens.files,
    ]
    return Output(tuple(files), tuple(tokens.notes))


def modeling() -> bytes:
    """The modeling file that is shipped with this package."""
    return (Path(__file__).parent / "hub" / f"{MODELING}.py").read_bytes()


def empty(checkpoint: Checkpoint, kind: str) -> Any:
    """The model of the modeling file, without memory for its weights."""
    import torch

    from surgery.upcycling.attention.hub.modeling_attention_moe import AttentionMoeConfig, AttentionMoeForCausalLM

    found = config_of(checkpoint.spec, checkpoint.details["attention"], {}, kind)  # type: ignore[arg-type]
    config = AttentionMoeConfig(**{k: v for k, v in found.items() if k not in ("auto_map", "model_type")})
    with torch.device("meta"):
        return AttentionMoeForCausalLM(config).to(getattr(torch, kind))


def weights_of(checkpoint: Checkpoint) -> dict[str, Lazy]:
    """What its parameters hold."""
    spec = checkpoint.spec
    woven = spread(_table(spec), checkpoint.parts, spec, Topology())[Rank()]
    routers = {_STORED.format(i): checkpoint.parts[_ROUTER.format(i)] for i in range(spec.layers)}
    return {**{name: s.tensor for name, s in woven.items()}, **routers}


# ------------------------------------------------------------------------------------------------------- reading


def open_attention(folder: Path, options: Options) -> Checkpoint:
    """What `plan` wrote; the modeling file is compared, never run.  Raises SurgeryError."""
    file = str(folder / "config.json")
    config = read_json(folder / "config.json", "config.json")
    if not isinstance(config, dict) or config.get("model_type") != MODEL_TYPE:
        raise ConfigError("is no model with attention experts", file=file)
    spec, wanted, facts = _read_config(config, file)
    tensors = open_tensors(folder)
    routers = {_STORED.format(i): _ROUTER.format(i) for i in range(spec.layers)}
    if missing := [name for name in routers if name not in tensors]:
        raise ConfigError(f"{missing[0]} is missing", file=folder)
    rest = {name: t for name, t in tensors.items() if name not in routers}
    gathered = gather(_table(spec), {Rank(): rest}, spec, Topology())
    parts = {**gathered.parts, **{part: tensors[name] for name, part in routers.items()}}
    files = tuple(path for container in tensors.containers for path in container.paths)
    return Checkpoint("hf-attention", folder, spec, parts, config=config, facts=facts, files=files,
                      details={"attention": wanted})  # fmt: skip


def _read_config(config: Mapping[str, Any], file: str) -> tuple[Spec, Attention, dict[str, object]]:
    names = ("num_attention_experts", "num_attention_experts_per_tok", "num_local_experts", "num_experts_per_tok")
    numbers = {name: config.get(name) for name in names}
    for name, value in numbers.items():
        if type(value) is not int or not 0 <= value < 1 << 16:
            raise ConfigError(f"{name} is {show(value)}", file=file)
    moe, biased = bool(numbers["num_local_experts"]), bool(config.get("attention_bias"))
    own = {"rotary_base", "rotary_scaling", "attention_scale", "auto_map", "attention_bias", *names[:2]}
    plain = {k: v for k, v in config.items() if k not in own and (moe or k not in names)}
    plain["model_type"] = "mixtral" if moe else "qwen2" if biased else "llama"
    plain |= {"rope_theta": config.get("rotary_base"), "rope_scaling": config.get("rotary_scaling") or None}
    if moe:
        plain["sliding_window"] = None
    spec, facts, _ = read_config(plain, file)
    return spec, Attention(config[names[0]], config[names[1]]), dict(facts)


@dataclass(frozen=True)
class AttentionFormat(Format):
    """Written and read as a whole: its routers of attention are no parts of a Spec."""

    def open(self, folder: Path, options: Options) -> Checkpoint:
        return open_attention(folder, options)

    def plan(self, checkpoint: Checkpoint, topology: Topology, options: Options) -> Output:
        return plan(checkpoint, topology, options)


FORMAT = AttentionFormat(
    name="hf-attention",
    who="Hugging Face",
    title="Hugging Face with attention experts (config.json, modeling_attention_moe.py, *.safetensors)",
    locate=lambda folder: Place(folder, folder) if (folder / f"{MODELING}.py").is_file() else None,
    read=hf.read,
    spec=hf.spec,
    table=hf.stored_table,
    draft=hf.draft,
    options=(Option("shard_size", "largest weight file (same as --shard-size)", "5GB", (), "write"),),
)

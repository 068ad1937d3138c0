"""What a Megatron checkpoint says besides its tensors: args, iteration, options; both of its formats share it.

written(checkpoint, topology, options, more={}).root     # {"args": Namespace(...), "iteration": 7, ...}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.containers.pickles.records import Obj
from surgery.containers.torch_writer import Record
from surgery.errors import ConfigError, LayoutError, UsageError, show, some
from surgery.formats import optimizer
from surgery.formats.account import OPTIMIZER, RANDOM, READ, SCHEDULER, TRAINER, Rule
from surgery.formats.base import Checkpoint, Config, Option, Options, Reading, number
from surgery.formats.megatron.config import BUILT_IN_FACTOR, padding, read_args, write_args
from surgery.formats.megatron.dist_optimizer import Rates, decays
from surgery.formats.megatron.files import chosen_iteration
from surgery.formats.megatron.optimizer_writer import Wanted
from surgery.formats.megatron.table import table
from surgery.formats.table import Table
from surgery.formats.topology import Topology
from surgery.model.spec import Spec
from surgery.units import divisors

# what is known of the entries of a checkpoint that are no tensors of the model
ENTRIES: tuple[Rule, ...] = (
    Rule(r"args|checkpoint_version|iteration|surgery|content_metadata|common_state/.*", verdict=READ),
    Rule(r"(optimizer|chained_\d+)(?:[._/].*)?", OPTIMIZER),
    Rule(r"(opt_param_scheduler|lr_scheduler)(?:[./].*)?", SCHEDULER),
    Rule(r"(rng_state)(?:[./].*)?", RANDOM),
    Rule(r"num_floating_point_operations_so_far", "a counter of the run"),
    Rule(r"(rerun_state_machine(?:_state)?)(?:[./].*)?", TRAINER),
    Rule(r"(?:.*\.)?(_extra_state)\d*(?:/.*)?", "Transformer Engine's own state (FP8 scales), no weight"),
)
_COUNTERS = ("consumed_train_samples", "consumed_valid_samples")
OPTIONS = (
    Option("spec", "names of norms and attention: te (Transformer Engine) or local; auto: as the source, else te",
           "auto", ("auto", "local", "te"), "write"),
    Option("experts", "sequential, grouped (GroupedMLP, core < 0.15) or te_grouped; auto: as the source, else "
           "sequential", "auto", ("auto", "sequential", "grouped", "te_grouped"), "write"),
    Option("etp", "ranks that share the tensors of each expert, a divisor of tp; auto: tp", "auto", (), "write"),
    Option("vocab_multiple", "the vocabulary is padded to a multiple of this times tp", "128", (), "write"),
    Option("iteration", "the iteration to write, or release; auto: the source's own, else 1", "auto", (), "write"),
    Option("max_lr", "with --optimizer: --lr of the run that goes on, by which core 0.19 and later tell their groups; "
           "auto: not written, and the run's own counts", "auto", (), "write", of_optimizer=True),
    Option("min_lr", "with max_lr: --min-lr of that run; auto: 0", "auto", (), "write", of_optimizer=True),
    Option("rope_factor", "factor of the scaled rope, where args.rope_scaling_factor is not 8", "auto", (), "read"),
)  # fmt: skip
LEGACY_OPTIONS = (
    Option("optimizer", "with --optimizer: plain (in model_optim_rng.pt) or distributed (in distrib_optim.pt, for runs "
           "with --use-distributed-optimizer)", "plain", ("plain", "distributed"), "write", of_optimizer=True),
    Option("adam", "with optimizer=plain: fused (FusedAdam of Transformer Engine, Apex) or torch (AdamW); auto: fused "
           "where spec is te", "auto", ("auto", "fused", "torch"), "write", of_optimizer=True),
)  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """What the tensors show: rows of the embedding, how many layers there are, and how all are laid out.  `factor` is
    the rope's where surgery wrote the file: Megatron's own args leave a doubt."""

    vocab: int
    factor: float | None = None
    layers: int = 0
    table: Table | None = None


def spec(config: Config, file: str, seen: Seen, options: Options) -> Reading:
    """What the args mean."""
    found, notes = read_args(config, file, seen.vocab, number(options, "rope_factor") or seen.factor)
    return Reading(found, notes, padding=padding(config, seen.vocab))


def namespace(root: Mapping[Any, Any], file: Path) -> Mapping[str, Any]:
    """The attributes of `args`.  Raises ConfigError if there is none."""
    args = root.get("args")
    found = args.state if isinstance(args, Obj) else args
    if not isinstance(found, dict) or not all(type(k) is str for k in found):
        raise ConfigError("holds no args, which describe the model", file=file,
                          hint="checkpoints of Megatron-Bridge and of programs of one's own are not read")  # fmt: skip
    return found


_SIZES = (
    ("tensor_model_parallel_size", "model_parallel_size"),  # the second: before pipelines
    ("pipeline_model_parallel_size",),
    ("expert_model_parallel_size",),
    ("expert_tensor_parallel_size",),
)


def parallel_sizes(args: Mapping[str, Any], file: Path) -> tuple[int, int, int, int]:
    """tp, pp, ep and the tp of experts.  Raises ConfigError if one is no size."""
    found = []
    for names in _SIZES:
        value = next((args[name] for name in names if args.get(name) is not None), None)
        if value is not None and (type(value) is not int or not 0 < value < 1 << 16):
            raise ConfigError(f"{names[0]} is {show(value)}, not a positive whole number", file=file)
        found.append(value)
    tp, pp, ep, etp = found
    return tp or 1, pp or 1, ep or 1, (etp if args.get("num_experts") else None) or tp or 1


def check_heads(spec: Spec, tp: int) -> None:
    """Raise LayoutError for key/value heads that Megatron would have to copy."""
    if spec.kv_heads % tp:
        raise LayoutError(f"cannot divide {spec.kv_heads} key/value heads among {tp} ranks, and Megatron copies none",
                          hint=f"--tp {divisors(spec.kv_heads)}")  # fmt: skip


def run_details(root: Mapping[Any, Any], args: Mapping[str, Any]) -> dict[str, object]:
    """What people want to know of the run."""
    found = {"iteration": root.get("iteration")} | {name: args.get(name) for name in _COUNTERS}
    sizes = {name: args.get(name) for name in ("data_parallel_size", "context_parallel_size")}
    out: dict[str, object] = {k: v for k, v in found.items() if type(v) is int}
    out |= {k: v for k, v in sizes.items() if type(v) is int and v > 1}
    return out | {k: show(args[k])[1:-1] for k in ("transformer_impl", "tokenizer_type") if type(args.get(k)) is str}


def own_factor(root: Mapping[Any, Any]) -> float | None:
    """The rope's factor where surgery wrote the file: Megatron's own args leave a doubt."""
    mark = root.get("surgery")
    factor = mark.get("rope_factor") if isinstance(mark, dict) else None
    return float(factor) if isinstance(factor, (int, float)) and 0 < factor < 1e6 else None


# ------------------------------------------------------------------------------------------------------- writing


IMPL = {"local": "local", "te": "transformer_engine"}
EXPERT_ARGS = {
    "sequential": {"moe_grouped_gemm": False, "moe_use_legacy_grouped_gemm": False},
    "grouped": {"moe_grouped_gemm": True, "moe_use_legacy_grouped_gemm": True},
    "te_grouped": {"moe_grouped_gemm": True, "moe_use_legacy_grouped_gemm": False},
}
DEFAULTS = {"spec": "te", "experts": "sequential"}


def chosen(options: Options, name: str, carried: object) -> str:
    """An option; auto: as the source was if that is a choice, else what upstream's current release loads."""
    choice = options.get(name, "auto")
    known = IMPL if name == "spec" else EXPERT_ARGS
    return choice if choice != "auto" else str(carried) if carried in known else DEFAULTS[name]


def whole_number(options: Options, name: str) -> int:
    text = options[name]
    if not (text.isdigit() and 0 < int(text) < 1 << 20):
        raise UsageError(f"-O {name}={show(text)} is no positive whole number")
    return int(text)


def with_experts(spec: Spec, topology: Topology, options: Options) -> Topology:
    """The topology with -O etp.  Raises UsageError if it does not divide tp."""
    if options.get("etp", "auto") == "auto":
        return topology
    etp = whole_number(options, "etp")
    if topology.tp % etp or not spec.experts:
        raise UsageError(f"-O etp={etp} does not fit {spec.experts} experts on {topology.tp} tensor-parallel ranks")
    return replace(topology, etp=None if etp == topology.tp else etp)


@dataclass(frozen=True)
class Written:
    """What is written besides the tensors.  `args` describe the model, `root` holds them and the counters."""

    args: Mapping[str, Any]
    root: Mapping[str, Any]
    norms: str
    experts: str
    topology: Topology
    multiple: int
    iteration: int | None
    seen: Seen
    notes: tuple[str, ...]
    wanted: Wanted


def rates(options: Options) -> Rates:
    """What -O max_lr and min_lr say of the groups.  Raises UsageError."""
    highest, lowest = number(options, "max_lr"), number(options, "min_lr")
    if highest is None and lowest:
        raise UsageError("-O min_lr goes with -O max_lr")
    return {} if highest is None else {"max_lr": highest, "min_lr": lowest or 0.0}


def loaded_by(options: Options, norms: str) -> Wanted:
    """Who is to load an optimizer's state.  Raises UsageError."""
    adam, distributed = options.get("adam", "auto"), options.get("optimizer") == "distributed"
    if distributed and adam != "auto":
        raise UsageError(f"-O adam={adam} goes with -O optimizer=plain: the distributed optimizer counts updates alike "
                         "for both")  # fmt: skip
    return Wanted(adam == "fused" or (adam == "auto" and norms == "te"), rates(options), distributed)


def written(checkpoint: Checkpoint, topology: Topology, options: Options, more: Mapping[str, Any]) -> Written:
    """Args of primitives only, so that stock loaders take them.  Raises UsageError, LayoutError."""
    spec, carried = checkpoint.spec, checkpoint.details
    norms = chosen(options, "spec", carried.get("layer names"))
    experts = chosen(options, "experts", carried.get("experts"))
    check_heads(spec, topology.tp)
    topology = with_experts(spec, topology, options)
    multiple = whole_number(options, "vocab_multiple")
    iteration = chosen_iteration(options, carried.get("iteration", carried.get("step")))
    args = write_args(spec) | {
        "tensor_model_parallel_size": topology.tp, "pipeline_model_parallel_size": topology.pp,
        "expert_model_parallel_size": topology.ep, "expert_tensor_parallel_size": topology.expert_tp,
        "virtual_pipeline_model_parallel_size": topology.vpp if topology.vpp > 1 else None,
        "num_layers_per_virtual_pipeline_stage": (
            spec.layers // (topology.pp * topology.vpp) if topology.vpp > 1 else None
        ),
        "make_vocab_size_divisible_by": multiple, "padded_vocab_size": padded(spec.vocab, topology, multiple),
        "vocab_size": spec.true_vocab or spec.vocab, "bf16": checkpoint.dtype == "bfloat16",
        "fp16": checkpoint.dtype == "float16", "iteration": iteration or 0, "tokenizer_type": None,
        "consumed_train_samples": carried.get("consumed_train_samples", 0),
        "consumed_valid_samples": carried.get("consumed_valid_samples", 0),
        "transformer_impl": IMPL[norms], **EXPERT_ARGS[experts], **more,
    }  # fmt: skip
    root: dict[str, Any] = {"args": Record("argparse", "Namespace", (), args), "checkpoint_version": 3.0,
                            "iteration": iteration or 0}  # fmt: skip
    if args.get("rope_scaling_factor", BUILT_IN_FACTOR) != BUILT_IN_FACTOR:
        root["surgery"] = {"rope_factor": args["rope_scaling_factor"]}
    wanted = loaded_by(options, norms)
    notes = (*notes_of(checkpoint, topology, multiple), *optimizer_notes(checkpoint, wanted, args["ckpt_format"]))
    seen = Seen(spec.vocab, own_factor(root))
    return Written(args, root, norms, experts, topology, multiple, iteration, seen, notes, wanted)


def scheduler(written: optimizer.Written, plan: Written) -> dict[str, Any]:
    """What Megatron's loaders ask for: the rate as it was, for ever.  Steps are counted in samples."""
    lr = next((group.lr for group in written.groups.values() if group.lr is not None), 0.0)
    decay = max((group.weight_decay for group in written.groups.values()), default=0.0)
    samples = plan.args["consumed_train_samples"]
    return {"max_lr": lr, "lr_warmup_steps": 0, "num_steps": samples, "lr_decay_style": "constant",
            "lr_decay_steps": max(samples, 1), "min_lr": 0.0, "start_wd": decay, "end_wd": decay,
            "wd_incr_style": "constant", "wd_incr_steps": max(samples, 1)}  # fmt: skip


def padded(rows: int, topology: Topology, multiple: int) -> int:
    """Rows of the vocabulary as they are stored: `multiple` for every tensor-parallel rank."""
    multiple *= topology.tp
    return -(-rows // multiple) * multiple


def notes_of(checkpoint: Checkpoint, topology: Topology, multiple: int) -> list[str]:
    """What has to be said about every Megatron checkpoint that is written."""
    spec, notes = checkpoint.spec, []
    rows = padded(spec.vocab, topology, multiple)
    if rows != spec.vocab:
        notes.append(f"the vocabulary of {spec.vocab} rows is padded with zeros to {rows}, a multiple of "
                     f"{multiple} x tp (-O vocab_multiple=N)")  # fmt: skip
    if checkpoint.tokenizer is not None:
        notes.append("Megatron keeps no tokenizer in its checkpoints: give the source's to --tokenizer-model")
    if spec.rope and spec.rope.scaling.get("type") == "llama3" and spec.rope.scaling["factor"] != BUILT_IN_FACTOR:
        notes.append(f"the rope's factor is {spec.rope.scaling['factor']}; pretrain_gpt.py computes with "
                     f"{BUILT_IN_FACTOR:g} whatever rope_scaling_factor says, up to core 0.20 at least")  # fmt: skip
    if any(spec.windows):
        notes.append("window_size needs core 0.13 or newer: older releases attend to everything")
    return notes


def optimizer_notes(checkpoint: Checkpoint, wanted: Wanted, form: str) -> list[str]:
    """What has to be said about the state of an optimizer that is written; `form` is args.ckpt_format."""
    if checkpoint.optimizer is None:
        return []
    notes = [
        "the scheduler is written at the rate of the last update, held constant: Megatron stops where its "
        "arguments say otherwise, unless --override-opt_param-scheduler takes these (your schedule, at the samples "
        "consumed so far) or --use-checkpoint-opt_param-scheduler takes what is written (the same rate for ever)"
    ]
    if wanted.distributed:
        notes.append("distrib_optim.pt is for runs with --use-distributed-optimizer, on any number of data-parallel "
                     "ranks; with --overlap-grad-reduce if every parameter has a multiple of 64 elements")  # fmt: skip
    elif form == "torch":
        notes.append(
            "updates are counted by group, for FusedAdam of Transformer Engine and Apex; torch's AdamW needs "
            "-O adam=torch"
            if wanted.fused else
            "updates are counted for every parameter, for torch's AdamW; Transformer Engine's FusedAdam stops at that: "
            "-O adam=fused"
        )  # fmt: skip
    rows = table("local", "sequential").rows
    if changed := optimizer.decay_changes(checkpoint.optimizer, rows, lambda name: not decays(name)):
        parts = sorted({part for _, part in changed})
        notes.append(f"Megatron decays all but norms and biases: {some(parts, 20)} did otherwise before")
    if not wanted.rates:
        notes.append("core 0.19 and later tell groups of parameters by --lr and --min-lr: for these give yours with "
                     "-O max_lr=... -O min_lr=...")  # fmt: skip
    return notes

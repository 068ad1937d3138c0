"""Time and memory of planning: a mixture of experts of 400B parameters, opened and planned into every format.

    python bench/plan.py                                  # 61 layers x 256 experts, about 47,000 tensors
    python bench/plan.py --layers 8 --to megatron --profile

The checkpoint is made of sparse files: real headers, no data (some 800 GB that take no room on the disk).  Each plan
runs in a process of its own: `open` and `plan` are seconds without Python's imports, `cpu` is the processor time of
both, `peak` is the process's memory, imports included (`surgery` plans without torch).
"""

from __future__ import annotations

import argparse
import itertools
import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 12288, "moe_intermediate_size": 2048, "num_experts": 256, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 40960, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "tie_word_embeddings": False,
    "vocab_size": 151936, "torch_dtype": "bfloat16", "attention_bias": False, "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}  # fmt: skip
PLANS = {
    "hf": [],
    "megatron tp8 ep8": ["--tp", "8", "--ep", "8"],
    "megatron tp4 ep64 etp1": ["--tp", "4", "--ep", "64", "-O", "etp=1"],
    "megatron-dist": ["--tp", "8", "--ep", "8"],
    "olmo-core": [],
}
CHILD = """
import cProfile, json, pstats, resource, sys, time
from surgery.cli import main
from surgery.formats.registry import open_checkpoint
from surgery.conversion.convert import plan_for
from surgery.conversion.request import Write
from surgery.formats.topology import Topology
src, to, sizes, options, profile = json.loads(sys.argv[1])
watch = cProfile.Profile()
if profile:
    watch.enable()
began, cpu = time.monotonic(), time.process_time()
checkpoint = open_checkpoint(src)
opened = time.monotonic()
plan = plan_for(checkpoint, Write(to=to, topology=Topology(**sizes), options=options, max_memory=1 << 30))
done, cpu = time.monotonic(), time.process_time() - cpu
watch.disable()
if profile:
    pstats.Stats(watch, stream=sys.stderr).sort_stats("cumulative").print_stats(45)
    pstats.Stats(watch, stream=sys.stderr).sort_stats("tottime").print_stats(30)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"parts": len(checkpoint.parts), "files": len(plan.output.files), "bytes": plan.bytes,
                  "tensors": sum(len(f.regions) for f in plan.output.files), "open": opened - began,
                  "plan": done - opened, "cpu": cpu, "peak": peak, "torch": "torch" in sys.modules}))
"""


def tensors(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes in Hugging Face's order: (rows, columns) of everything."""
    c = CONFIG
    h, heads, groups, width = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], h), "model.norm.weight": (h,),
                                       "lm_head.weight": (c["vocab_size"], h)}  # fmt: skip
    for i in range(layers):
        at = f"model.layers.{i}."
        out |= {
            at + "input_layernorm.weight": (h,), at + "post_attention_layernorm.weight": (h,),
            at + "self_attn.q_norm.weight": (width,), at + "self_attn.k_norm.weight": (width,),
            at + "self_attn.q_proj.weight": (heads * width, h), at + "self_attn.k_proj.weight": (groups * width, h),
            at + "self_attn.v_proj.weight": (groups * width, h), at + "self_attn.o_proj.weight": (h, heads * width),
            at + "mlp.gate.weight": (c["num_experts"], h),
        }  # fmt: skip
        for e in range(c["num_experts"]):
            own, m = f"{at}mlp.experts.{e}.", c["moe_intermediate_size"]
            out |= {own + "gate_proj.weight": (m, h), own + "up_proj.weight": (m, h), own + "down_proj.weight": (h, m)}
    return out


def make(folder: Path, layers: int) -> None:
    """Write the checkpoint: one file per layer, one for the rest."""
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in tensors(layers).items():
        layer = int(name.split(".")[2]) + 1 if ".layers." in name else 0
        groups.setdefault(f"model-{layer + 1:05d}-of-{layers + 1:05d}.safetensors", {})[name] = shape
    total = 0
    for file, held in groups.items():
        header, at = {}, 0
        for name, shape in held.items():
            size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + at)
        total += at
    places = {name: file for file, held in groups.items() for name in held}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))


def measure(src: Path, to: str, flags: list[str], profile: bool) -> dict[str, float]:
    sizes = {flag[2:]: int(value) for flag, value in itertools.pairwise(flags) if flag.startswith("--")}
    options = dict(value.split("=") for flag, value in itertools.pairwise(flags) if flag == "-O")
    words = json.dumps([str(src), to.split()[0], sizes, options, profile])
    done = subprocess.run([sys.executable, "-c", CHILD, words], stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--dir", type=Path, help="where the sparse files go (a temporary folder)")
    parser.add_argument("--to", help="only plans whose name contains this")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="surgery-plan-", dir=given.dir) as scratch:
        src = Path(scratch)
        make(src, given.layers)
        print(f"{'to':24s} {'parts':>7s} {'tensors':>8s} {'files':>6s} {'GB':>6s} {'open s':>7s} {'plan s':>7s} "
              f"{'cpu s':>6s} peak MB")  # fmt: skip
        for name, flags in PLANS.items():
            if given.to is None or given.to in name:
                r = measure(src, name, flags, given.profile)
                print(f"{name:24s} {r['parts']:7d} {r['tensors']:8d} {r['files']:6d} {r['bytes'] / 1e9:6.0f} "
                      f"{r['open']:7.1f} {r['plan']:7.1f} {r['cpu']:6.1f} {r['peak'] / 1e6:7.0f}",
                      flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

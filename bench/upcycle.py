"""Time and memory of `surgery upcycle` against the physical cost: `cp` of the output.

    python bench/upcycle.py --dir /big/disk/tmp                 # 1.1B dense -> 8 experts: 13 GB of output, twice
    python bench/upcycle.py --dir /tmp/bench --layers 2 --runs 1

A synthetic Llama-shaped checkpoint in bfloat16 becomes 8 copies (and 64 experts in virtual groups), which is read once
and written eight times.  `work` is what the program measures of writing, without Python's start; `peak` is the memory
above a process that only imports the modules.  The proof is left out: it runs the models, and says how long that took.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path

from timing import Result, timed

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 64,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "vocab_size": 32000, "torch_dtype": "bfloat16", "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
EMPTY = "import torch, numpy, surgery.cli.main, surgery.conversion.convert, surgery.upcycling.run"
WAYS = {
    "8 copies, top-2": ["--experts", "8", "--top-k", "2", "--strategy", "copy"],
    "64 in virtual groups, top-8": ["--experts", "64", "--top-k", "8"],
}


def make(folder: Path, layers: int) -> int:
    """The dense checkpoint; returns how many parameters it has."""
    import torch
    from safetensors.torch import save_file

    h, f, v, kv = 2048, 5632, 32000, 256
    shapes = {"model.embed_tokens": (v, h), "model.norm": (h,), "lm_head": (v, h)}
    for l in range(layers):
        at = f"model.layers.{l}"
        shapes |= {f"{at}.self_attn.q_proj": (h, h), f"{at}.self_attn.k_proj": (kv, h),
                   f"{at}.self_attn.v_proj": (kv, h), f"{at}.self_attn.o_proj": (h, h),
                   f"{at}.mlp.gate_proj": (f, h), f"{at}.mlp.up_proj": (f, h), f"{at}.mlp.down_proj": (h, f),
                   f"{at}.input_layernorm": (h,), f"{at}.post_attention_layernorm": (h,)}  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{n}.weight": (torch.randn(s, generator=generator) * 0.02).bfloat16() for n, s in shapes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return sum(t.numel() for t in tensors.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dir", type=Path, required=True, help="an existing folder on the disk to measure")
    parser.add_argument("--layers", type=int, default=22, help="22 layers are 1.1B parameters")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--max-memory", default="256MiB")
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)  # a process of its own: see below
    args = parser.parse_args()
    root = args.dir / "surgery-bench"
    if args.make:
        print(make(root / "dense", args.layers))
        return
    root.mkdir()
    try:
        # A child's peak begins at its parent's, so this process must stay small.
        again = [sys.executable, __file__, "--make", "--dir", str(args.dir), "--layers", str(args.layers)]
        parameters, imports = int(timed(again, Result())), Result()
        timed([sys.executable, "-c", EMPTY], imports)
        print(f"{parameters / 1e9:.2f}B parameters, {args.runs} runs, --max-memory {args.max_memory}")
        for name, flags in WAYS.items():
            measure(name, flags, root, args.runs, args.max_memory, imports.peak[0])
    finally:
        shutil.rmtree(root)


def measure(name: str, flags: list[str], root: Path, runs: int, memory: str, imports: int) -> None:
    """Upcycle and copy in turns, so that what else the machine does hits both; print the medians."""
    moe, copy = root / "moe", root / "copy"
    command = [sys.executable, "-m", "surgery", "upcycle", str(root / "dense"), str(moe), *flags, "--no-verify",
               "--max-memory", memory, "--json"]  # fmt: skip
    ours, copied, size = Result(), Result(), 0
    for _ in range(runs):
        ours.report = json.loads(timed(command, ours))
        ours.work.append(float(str(ours.report["seconds"])))
        size = int(str(ours.report["bytes"]))
        timed(["sh", "-c", f"cp -r '{moe}' '{copy}'; sync -f '{copy}'"], copied)
        shutil.rmtree(moe)
        shutil.rmtree(copy)
    wall, work, cp = (statistics.median(x) for x in (ours.wall, ours.work, copied.wall))
    print(f"{name}: {size / 1e9:.2f} GB; wall {wall:.1f} s, work {work:.1f} s; cp and sync {cp:.1f} s;"
          f" work / cp {work / cp:.2f}; peak {(max(ours.peak) - imports) / 1e6:.0f} MB above imports")  # fmt: skip


if __name__ == "__main__":
    main()

"""Time, memory and bytes of `surgery convert` against `cp` and against loading everything, mapping and saving.

    python bench/convert.py --dir /big/disk/tmp              # about 2 GB of weights, needs four times that in DIR
    python bench/convert.py --dir /tmp/bench --gb 0.2 --runs 1
    python bench/convert.py --dir /big/disk/tmp --chain      # through every format, eight times the weights in DIR

A synthetic Llama-shaped checkpoint goes Hugging Face -> Meta with two ranks -> Hugging Face; or, with --chain, Hugging
Face -> Megatron tp 4 pp 2 -> torch_dist -> GPT-NeoX tp 2 -> OLMo-core -> Hugging Face.  All runs of a round come
one after the other, so that what else the machine does hits all of them; medians of the rounds are printed.
`wall` is of the whole process, Python's imports included; `work` is what the program itself measures without them;
`cpu` and `peak` are the process's processor time and memory less those of a process that only imports the modules.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from timing import Result, timed

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "vocab_size": 32000, "torch_dtype": "bfloat16", "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
SHARD = 500 << 20
CHAIN = (  # a name for the folder, and how it is made of the one before; 32000 rows need no padding for four ranks
    ("megatron", ("--to", "megatron", "--tp", "4", "--pp", "2", "-O", "vocab_multiple=1000")),
    ("torch_dist", ("--to", "megatron-dist", "--tp", "2", "-O", "vocab_multiple=1000")),
    ("neox", ("--to", "neox", "--tp", "2")),
    ("olmo-core", ("--to", "olmo-core")),
    ("hf", ("--to", "hf")),
)
EMPTY = "import torch, numpy, surgery.cli.main, surgery.conversion.convert"

TODAY = '''
"""What people do today: load all, map, save.  One direction per call."""
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file

src, dst, way = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
dst.mkdir()
NAMES = {"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
         "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
         "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
TOP = {"model.embed_tokens.weight": "tok_embeddings.weight", "model.norm.weight": "norm.weight",
       "lm_head.weight": "output.weight"}
def meta_name(name):
    if name in TOP:
        return TOP[name]
    _, _, l, rest = name.split(".", 3)
    return f"layers.{l}.{NAMES[rest.removesuffix('.weight')]}.weight"
def cut(name):
    return None if "norm" in name else 1 if name.split(".")[-2] in ("wo", "w2") else 0
def turned(w, a, b):
    return w.unflatten(0, (-1, a, b)).transpose(1, 2).reshape(w.shape).contiguous()
if way == "meta":
    sd = {}
    for path in sorted(src.glob("*.safetensors")):
        sd |= load_file(path)
    out = {meta_name(k): w for k, w in sd.items()}
    for k in out:
        if k.endswith(("wq.weight", "wk.weight")):
            out[k] = turned(out[k], 2, 32)
    for r in range(2):
        part = {k: w if cut(k) is None else w.chunk(2, cut(k))[r].contiguous() for k, w in out.items()}
        torch.save(part, dst / f"consolidated.{r:02}.pth")
else:
    ranks = [torch.load(src / f"consolidated.{r:02}.pth", weights_only=True) for r in range(2)]
    layers = 1 + max(int(k.split(".")[1]) for k in ranks[0] if k.startswith("layers."))
    names = list(TOP) + [f"model.layers.{l}.{n}.weight" for l in range(layers) for n in NAMES]
    out = {}
    for name in names:
        m = meta_name(name)
        w = ranks[0][m] if cut(m) is None else torch.cat([r[m] for r in ranks], cut(m))
        out[name] = turned(w, 32, 2) if m.endswith(("wq.weight", "wk.weight")) else w
    save_file(out, dst / "model.safetensors", {"format": "pt"})
'''


Compared = dict[str, tuple[Path, Callable[[Result], object]]]  # name -> (the folder it writes, the run)


def make_checkpoint(folder: Path, size: float) -> int:
    """A sharded checkpoint of about `size` bytes in bfloat16; the same bits every time.  Returns its bytes."""
    import torch
    from safetensors.torch import save_file

    h, f, v, kv = 2048, 5632, 32000, 512
    layers = max(1, round((size - 4 * v * h) / 2 / (h * (2 * h + 2 * kv + 3 * f))))
    shapes = {"model.embed_tokens": (v, h), "model.norm": (h,), "lm_head": (v, h)}
    for l in range(layers):
        at = f"model.layers.{l}"
        shapes |= {f"{at}.self_attn.q_proj": (h, h), f"{at}.self_attn.k_proj": (kv, h),
                   f"{at}.self_attn.v_proj": (kv, h), f"{at}.self_attn.o_proj": (h, h),
                   f"{at}.mlp.gate_proj": (f, h), f"{at}.mlp.up_proj": (f, h),
                   f"{at}.mlp.down_proj": (h, f), f"{at}.input_layernorm": (h,),
                   f"{at}.post_attention_layernorm": (h,)}  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, shape in shapes.items():
        shards[-1][f"{name}.weight"] = (torch.randn(shape, generator=generator) * 0.02).bfloat16()
        if sum(t.nbytes for t in shards[-1].values()) > SHARD:
            shards.append({})
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, {"format": "pt"})
    total = sum(t.nbytes for shard in shards for t in shard.values())
    where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def convert(src: Path, dst: Path, result: Result, *flags: str) -> None:
    out = timed([sys.executable, "-m", "surgery", "convert", str(src), str(dst), "--json", *flags], result)
    result.report = json.loads(out)
    result.work.append(float(str(result.report["seconds"])))


def kinds(root: Path, memory: str) -> Compared:
    """Hugging Face to Meta and back: `cp`, surgery, and what people do today."""
    hf, meta, out = root / "hf", root / "meta", root / "out"
    to_meta, to_hf = ["--to", "meta", "--tp", "2", "--max-memory", memory], ["--to", "hf", "--max-memory", memory]
    script = root / "today.py"
    script.write_text(TODAY)
    return {
        "cp -r": (out, lambda r: timed(["cp", "-r", str(hf), str(out)], r)),
        "cp -r, sync": (out, lambda r: timed(["sh", "-c", f"cp -r '{hf}' '{out}'; sync -f '{out}'"], r)),
        "surgery hf > meta": (out, lambda r: convert(hf, out, r, *to_meta, "--no-verify")),
        "surgery meta > hf": (out, lambda r: convert(meta, out, r, *to_hf, "--no-verify")),
        "surgery hf > meta, verified": (out, lambda r: convert(hf, out, r, *to_meta)),
        "load all, hf > meta": (out, lambda r: timed([sys.executable, str(script), str(hf), str(out), "meta"], r)),
        "load all, meta > hf": (out, lambda r: timed([sys.executable, str(script), str(meta), str(out), "hf"], r)),
    }


def chain(root: Path, memory: str) -> Compared:
    """`kinds` for the way through every format: each hop alone, from what the hop before wrote."""
    hf, out = root / "hf", root / "out"
    compared: Compared = {
        "cp -r": (out, lambda r: timed(["cp", "-r", str(hf), str(out)], r)),
        "cp -r, sync": (out, lambda r: timed(["sh", "-c", f"cp -r '{hf}' '{out}'; sync -f '{out}'"], r)),
    }
    last, src = "hf", hf
    for name, flags in CHAIN:
        dst = root / ("back" if name == "hf" else name)
        flags = (*flags, "--max-memory", memory)
        convert(src, dst, Result(), *flags)

        def hop(result: Result, src: Path = src, flags: tuple[str, ...] = flags) -> None:
            convert(src, out, result, *flags, "--no-verify")

        compared[f"{last} > {name}"] = (out, hop)
        last, src = name, dst
    return compared


def same_weights(a: Path, b: Path) -> bool:
    """Are the tensors of two Hugging Face folders the same, bit for bit?"""
    import torch
    from safetensors import safe_open

    def where(folder: Path) -> dict[str, Path]:
        return {k: p for p in folder.glob("*.safetensors") for k in safe_open(p, "pt").keys()}  # noqa: SIM118

    ours, theirs = where(a), where(b)
    if ours.keys() != theirs.keys():
        return False
    pairs = ((safe_open(ours[k], "pt").get_tensor(k), safe_open(theirs[k], "pt").get_tensor(k)) for k in ours)
    return all(torch.equal(x.view(torch.int16), y.view(torch.int16)) for x, y in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dir", type=Path, required=True, help="an existing folder on the disk to measure")
    parser.add_argument("--gb", type=float, default=2.0, help="size of the checkpoint in GB")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--max-memory", default="256MiB")
    parser.add_argument("--chain", action="store_true", help="through every format, one hop after the other")
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)  # in a process of its own: see below
    args = parser.parse_args()
    root = args.dir / "surgery-bench"
    if args.make:
        print(make_checkpoint(root / "hf", args.gb * 1e9))
        return
    root.mkdir()
    try:
        # A child's peak begins at its parent's, so this process must stay small.
        size = int(timed([sys.executable, __file__, "--make", "--dir", str(args.dir), "--gb", str(args.gb)], Result()))
        if args.chain:
            compared = chain(root, args.max_memory)
        else:
            compared = kinds(root, args.max_memory)
            convert(root / "hf", root / "meta", Result(), "--to", "meta", "--tp", "2", "--max-memory", args.max_memory)
            convert(root / "meta", root / "back", Result(), "--to", "hf", "--max-memory", args.max_memory)
        show(*measure(compared, args.runs), size)
        print(f"{size / 1e9:.2f} GB of weights; bit-identical after the way there and back: "
              f"{same_weights(root / 'hf', root / 'back')}")  # fmt: skip
    finally:
        shutil.rmtree(root)


def measure(compared: Compared, runs: int) -> tuple[dict[str, Result], Result]:
    imports = Result()
    results = {name: Result() for name in compared}
    for _ in range(runs):
        timed([sys.executable, "-c", EMPTY], imports)
        for name, (out, run) in compared.items():
            run(results[name])
            shutil.rmtree(out)
            os.sync()
    return results, imports


def show(results: dict[str, Result], imports: Result, size: int) -> None:
    mid = statistics.median
    base, synced = mid(results["cp -r"].wall), mid(results["cp -r, sync"].wall)
    head = ("", "wall s", "work s", "/ cp", "/ cp+sync", "cpu s", "peak MiB", "read", "written")
    print(f"{head[0]:30}" + "".join(f"{title:>11}" for title in head[1:]))
    for name, result in results.items():
        less = Result(cpu=[0], peak=[0]) if name.startswith("cp") else imports
        wall, cpu = mid(result.wall), mid(result.cpu) - mid(less.cpu)
        work = mid(result.work) if result.work else wall
        row = [wall, work, work / base, work / synced, cpu, (mid(result.peak) - mid(less.peak)) / 2**20]
        row += [int(str(result.report[key])) / size for key in ("read_bytes", "bytes") if result.report]
        print(f"{name:30}" + "".join(f"{value:>11.2f}" for value in row))
    print(f"imports alone: {mid(imports.wall):.2f} s, {mid(imports.peak) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()

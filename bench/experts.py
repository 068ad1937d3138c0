"""Experts, backend by backend: one layer forward and backward, and a step of a small model, against transformers' own.

    python bench/experts.py                          # on the CPU, one thread: milliseconds of the processor
    python bench/experts.py --threads 2 --part model # wall-clock milliseconds too, for an idle machine
    python bench/experts.py --device cuda            # shapes of a 7B mixture; megablocks and scattermoe if installed

All variants run in turns in one process, on tokens that choose anew every time, as in training.  Printed are the
fastest and the median round, how many times faster than transformers' loop in fp32 (`eager`) that is, and how far the
gradients are from its; of the multiplications of the experts (and, of a model, of its other matrices) how many are done
in a second.  `hf_grouped_mm` is transformers' function of that name, its default.
"""

from __future__ import annotations

import argparse
import statistics
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from surgery.midtraining.experts import EXPERTS, keep_compiled_gemms, use_experts
from surgery.midtraining.routers import Mixture, find_mixtures

THEIRS = {"eager": "eager", "hf_grouped_mm": "grouped_mm"}
# experts, top_k, width, width of an expert, tokens
LAYERS = {"cpu": [(8, 2, 128, 352, 2048), (64, 8, 128, 88, 2048), (64, 8, 128, 88, 512), (32, 4, 512, 512, 512)],
          "cuda": [(8, 2, 4096, 14336, 8192), (64, 8, 2048, 1024, 16384), (128, 8, 2048, 768, 16384)]}  # fmt: skip
# layers, experts, top_k, width, width of an expert, rows, tokens of a row
MODELS = {"cpu": [(4, 8, 2, 128, 352, 16, 128), (4, 64, 8, 128, 88, 16, 128)],
          "cuda": [(4, 64, 8, 2048, 1024, 4, 4096)]}  # fmt: skip


@dataclass
class Times:
    """Milliseconds of every round: of the clock, and of the processor."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def model_of(layers: int, experts: int, top_k: int, width: int, inner: int, device: str) -> Any:
    """An OLMoE of these sizes, with routers that do not choose evenly."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "olmoe", num_hidden_layers=layers, hidden_size=width, intermediate_size=inner, num_experts=experts,
        num_experts_per_tok=top_k, vocab_size=2048 if device == "cpu" else 50304, num_attention_heads=width // 64,
        num_key_value_heads=width // 64, pad_token_id=None)  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config).float().train()


def choose(model: Any, mixtures: tuple[Mixture, ...], name: str) -> None:
    if name in THEIRS:
        model.set_experts_implementation(THEIRS[name])
    else:
        use_experts(model, mixtures, name)


def seeded(name: str, low: bool, turn: int) -> torch.Generator:
    """Everyone's tokens differ, or one would find the shapes of its products compiled by another; but for the first."""
    return torch.Generator().manual_seed(zlib.crc32(f"{name} {low} {turn}".encode()) if turn >= 0 else 0)


def clock(device: str) -> tuple[float, float]:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() * 1e3, time.process_time() * 1e3


def in_turns(variants: dict[str, Callable[[int], Any]], rounds: int, device: str) -> dict[str, Times]:
    """Every variant once to warm up, then all of them `rounds` times."""
    times = {name: Times() for name in variants}
    for turn in range(-1, rounds):
        for name, run in variants.items():
            wall, cpu = clock(device)
            run(turn)
            after = clock(device)
            if turn >= 0:
                times[name].wall.append(after[0] - wall)
                times[name].cpu.append(after[1] - cpu)
    return times


def runs_here(mixture: Mixture, device: str, low: bool) -> list[str]:
    """transformers' names and ours; says which of ours cannot run."""
    names = [*THEIRS, *(n for n, b in EXPERTS.items() if device in b.devices)]
    with torch.autocast(device, torch.bfloat16, enabled=low):
        why = {n: EXPERTS[n].refuses(mixture.experts) for n in names if n in EXPERTS}
    for name, reason in why.items():
        if reason:
            print(f"    {name}: {reason}")
    return [n for n in names if not why.get(n)]


def layer(shape: tuple[int, ...], rounds: int, device: str) -> None:
    experts, top_k, width, inner, tokens = shape
    model = model_of(1, experts, top_k, width, inner, device)
    mixtures = find_mixtures(model)
    module = mixtures[0].experts
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=generator).to(device).requires_grad_()
    weights = torch.full((tokens, top_k), 1 / top_k, device=device).requires_grad_()
    favour = torch.randn(experts, generator=generator) * 0.5

    def run(name: str, low: bool) -> Callable[[int], list[torch.Tensor]]:
        def once(turn: int) -> list[torch.Tensor]:
            choose(model, mixtures, name)
            drawn = torch.randn(tokens, experts, generator=seeded(name, low, turn))
            chosen = (drawn + favour).topk(top_k).indices.to(device)
            with torch.autocast(device, torch.bfloat16, enabled=low):
                y = module(x, chosen, weights)
            return list(torch.autograd.grad(y, [x, weights, *module.parameters()], torch.ones_like(y)))

        return once

    print(f"layer: {experts} experts, top {top_k}, {width} x {inner}, {tokens} tokens; forward and backward")
    compare(run, mixtures[0], rounds, device, tokens, 6 * tokens * top_k * 3 * width * inner)


def step(shape: tuple[int, ...], rounds: int, device: str) -> None:
    layers, experts, top_k, width, inner, rows, length = shape
    model = model_of(layers, experts, top_k, width, inner, device)
    mixtures = find_mixtures(model)
    adam = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)  # the weights stay: all variants do the same work

    def run(name: str, low: bool) -> Callable[[int], list[torch.Tensor]]:
        def once(turn: int) -> list[torch.Tensor]:
            choose(model, mixtures, name)
            ids = torch.randint(0, 2048, (rows, length), generator=seeded(name, low, turn)).to(device)
            with torch.autocast(device, torch.bfloat16, enabled=low):
                loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
            grads = [m.experts.down_proj.grad for m in mixtures]
            adam.step()
            adam.zero_grad(set_to_none=True)
            return grads

        return once

    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"model: {size:.1f}M parameters, {layers} layers, {experts} experts, top {top_k}, {width} x {inner};"
          f" a step of {rows} x {length} tokens")  # fmt: skip
    idle = layers * (experts - top_k) * 3 * width * inner + model.get_input_embeddings().weight.numel()
    compare(run, mixtures[0], rounds, device, rows * length, 6 * rows * length * (size * 1e6 - idle))


def compare(
    run: Callable[[str, bool], Callable[[int], Any]],
    mixture: Mixture,
    rounds: int,
    device: str,
    tokens: int,
    flops: float,
) -> None:
    """Time and print a table of all variants in fp32 and under autocast."""
    variants = {(name, low): run(name, low) for low in (False, True) for name in runs_here(mixture, device, low)}
    exact, gaps = variants["eager", False](-1), {}
    for variant, once in list(variants.items()):
        try:
            grads = once(-1)
        except RuntimeError as error:
            print(f"    {variant[0]}: {str(error).partition(chr(10))[0]}")
            del variants[variant]
            continue
        gaps[variant] = max(float((a - b).norm() / b.norm()) for a, b in zip(grads, exact, strict=True))
    times = in_turns({f"{n} {low}": once for (n, low), once in variants.items()}, rounds, device)
    measure = "cpu" if device == "cpu" else "wall"
    base = min(getattr(times["eager False"], measure))
    print(f"    {'':28}  ms min  median   wall min   x eager  tokens/s   GFLOP/s  gradients differ by")
    for name, low in variants:
        t = times[f"{name} {low}"]
        each = getattr(t, measure)
        label = f"{name}{' autocast bf16' if low else ' fp32'}"
        print(f"    {label:28}{min(each):8.1f}{statistics.median(each):8.1f}{min(t.wall):11.1f}{base / min(each):10.2f}"
              f"{tokens / min(each) * 1e3:10.0f}{flops / min(each) / 1e6:10.0f}    {gaps[name, low]:.0e}",
              flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--part", choices=("layer", "model"), help="one of the two alone")
    args = parser.parse_args()
    keep_compiled_gemms()
    torch.set_num_threads(args.threads)
    what = torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} thread(s)"
    print(f"torch {torch.__version__}, {what}, {args.rounds} rounds")
    for shape in LAYERS[args.device] if args.part != "model" else ():
        layer(shape, args.rounds, args.device)
    for shape in MODELS[args.device] if args.part != "layer" else ():
        step(shape, args.rounds, args.device)


if __name__ == "__main__":
    main()

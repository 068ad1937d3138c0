"""Ways to run experts, by name, behind transformers' experts interface; all equal to the loop, none drops a token.

    keep_compiled_gemms()                                # once, before anything is multiplied
    choice = fastest_experts(mixtures[0], tokens=4096)   # measures this model's shapes, on its device, as autocast is
    print(choice)                                        # "padded: 8 experts, top 2, ...: padded 21 ms, loop 27 ms ..."
    use_experts(model, mixtures, choice.name)

    loop         one expert after another; what the others are tested against
    grouped_mm   torch.nn.functional.grouped_mm
    padded       for CPUs: see experts_padded.py
    megablocks   permutation and grouped products of the package megablocks (CUDA, bf16)
    scattermoe   the package scattermoe (CUDA)

docs/experts.md says when each wins.  A new one is a function with these arguments and a line in `EXPERTS`.
"""

from __future__ import annotations

import difflib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from surgery.errors import UsageError
from surgery.midtraining.experts_padded import no_padded, padded
from surgery.midtraining.experts_torch import grouped_mm, loop, no_grouped_mm
from surgery.midtraining.experts_triton import megablocks, no_megablocks, no_scattermoe, scattermoe
from surgery.midtraining.routers import Mixture

# module, x [T, H], experts [T, K], weights [T, K] -> [T, H]
Run = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
REGISTERED = "surgery_"  # before the names in transformers' registry, which has a grouped_mm of its own
GEMMS = 50_000
ROUNDS = 5


@dataclass(frozen=True)
class Backend:
    """run: the function. refuses: why a module cannot be run by it, "" if it can. devices: where `auto` tries it."""

    run: Run
    refuses: Callable[[Any], str] = lambda _: ""
    devices: tuple[str, ...] = ("cpu", "cuda")


EXPERTS: Mapping[str, Backend] = {
    "loop": Backend(loop),
    "grouped_mm": Backend(grouped_mm, no_grouped_mm),
    "padded": Backend(padded, no_padded, ("cpu",)),
    "megablocks": Backend(megablocks, no_megablocks, ("cuda",)),
    "scattermoe": Backend(scattermoe, no_scattermoe, ("cuda",)),
}


def backend(name: str) -> Backend:
    """Raises UsageError if there is none of that name."""
    if name not in EXPERTS:
        near = difflib.get_close_matches(name, EXPERTS, 1)
        hint = f"did you mean {near[0]}?" if near else f"auto, {', '.join(EXPERTS)}"
        raise UsageError(f"there is no experts backend {name!r}", hint=hint)
    return EXPERTS[name]


def use_experts(model: Any, mixtures: Sequence[Mixture], name: str) -> None:
    """Run all experts of a transformers model by the backend of that name.

    Raises UsageError if there is no such backend, or if it cannot run these experts here.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    chosen = backend(name)
    for mixture in mixtures:
        if why := chosen.refuses(mixture.experts):
            raise UsageError(f"experts: {name} cannot run {mixture.name}: {why}", hint="experts: auto")
    ALL_EXPERTS_FUNCTIONS.register(REGISTERED + name, chosen.run)
    model.set_experts_implementation(REGISTERED + name)


def keep_compiled_gemms() -> None:
    """Let oneDNN keep 50,000 compiled matrix products instead of 1,024.  Call it before the first product on the CPU.

    oneDNN compiles a program for every shape of a bf16 product, and experts meet new shapes at every step, since the
    number of their tokens changes: a cache of 1,024 is overrun and everything is compiled anew for ever.  The library
    reads the variable once, at its first product; a value that the user has set stays.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(GEMMS))


# ---------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Choice:
    """The fastest backend; milliseconds of one layer, forward and backward, of each; why others were not tried."""

    name: str
    shape: str
    milliseconds: Mapping[str, float]
    refused: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        times = ", ".join(f"{n} {t:.3g} ms" for n, t in sorted(self.milliseconds.items(), key=lambda item: item[1]))
        refused = "".join(f"; not {n}: {why}" for n, why in self.refused.items())
        return f"{self.name}: {self.shape}: {times}{refused}"


def fastest_experts(mixture: Mixture, tokens: int, rounds: int = ROUNDS) -> Choice:
    """Time every backend for the mixture's device, in turns, on random tokens, experts and weights.

    tokens: of a micro-batch on this device.  Autocast is what it is at the call, so call where the loop would.  The
    fastest of `rounds` counts, after one to warm up.  Tokens choose anew every time, as in training: a backend that met
    its shapes again would seem faster than it is.  Memory: one more layer of experts, and their gradient.
    """
    module = stand_in(mixture.experts)
    device, dtype = module.down_proj.device, module.down_proj.dtype
    refused = {n: why for n, b in EXPERTS.items() if device.type in b.devices and (why := b.refuses(module))}
    names = [n for n, b in EXPERTS.items() if device.type in b.devices and n not in refused]
    width, count = module.down_proj.shape[2 if module.is_transposed else 1], module.num_experts
    top_k, generator = min(mixture.top_k, count), torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=generator).to(device, dtype).requires_grad_()
    weights = torch.full((tokens, top_k), 1 / top_k, device=device, dtype=dtype).requires_grad_()
    best = dict.fromkeys(names, float("inf"))
    for turn in range(rounds + 1):
        for name in [n for n in names if n not in refused]:
            chosen = torch.rand(tokens, count, generator=generator).topk(top_k, -1).indices.to(device)
            try:
                seconds = _timed(EXPERTS[name].run, module, x, chosen, weights)
            except RuntimeError as error:  # a kernel that was not made for this device
                refused[name] = str(error).partition("\n")[0]
                continue
            best[name] = min(best[name], seconds) if turn else best[name]
    cast = f" under {torch.get_autocast_dtype(device.type)}" if torch.is_autocast_enabled(device.type) else ""
    shape = f"{count} experts, top {top_k}, width {width}, {tokens} tokens, {dtype}{cast} on {device.type}"
    times = {name: seconds * 1e3 for name, seconds in best.items() if name not in refused}
    return Choice(min(times, key=lambda n: times[n]), shape.replace("torch.", ""), times, refused)


def stand_in(module: Any) -> Any:
    """All that a backend asks of the module, with random parameters that are whole, be its own sharded or not."""
    twin: Any = torch.nn.Module()
    twin.__dict__.update(vars(module), _parameters={})
    twin._apply_gate = module._apply_gate
    generator = torch.Generator(module.down_proj.device).manual_seed(0)  # a run's own random numbers stay what they are
    for name, p in module._parameters.items():
        rows = (module.num_experts, *p.shape[1:]) if p.ndim > 1 else p.shape
        fresh = torch.empty(rows, dtype=p.dtype, device=p.device).normal_(std=p.shape[-1] ** -0.5, generator=generator)
        setattr(twin, name, torch.nn.Parameter(fresh, requires_grad=p.requires_grad))
    return twin


def _timed(run: Run, module: Any, x: Tensor, experts: Tensor, weights: Tensor) -> float:
    """Seconds of a forward and a backward pass; no gradient is left anywhere."""
    wanted = [x, weights, *(p for p in module.parameters() if p.requires_grad)]
    began = _now(x.device)
    with torch.enable_grad():
        y = run(module, x, experts, weights)
        torch.autograd.grad(y, wanted, torch.ones_like(y))
    return _now(x.device) - began


def _now(device: torch.device) -> float:
    """Seconds of the clock on a GPU; of the processor on a CPU, where others may be at work."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()

"""Tests that a run makes before it starts, on its own model, data and device; a failed one stops it.

    results = self_test(job)                      # raises MismatchError, and says which test failed and why
    before = fingerprints(job.weights())          # before the first step
    results.append(moved(job, before))            # after it: what is trained has changed, what is frozen has not

Each takes a pass or two over a few hundred tokens.  `TESTS` lists them; `skip_self_tests` leaves some out.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from surgery.errors import MismatchError, UsageError, some
from surgery.midtraining import parallel
from surgery.midtraining.batching import MicroBatch, micro_batches, rows_of
from surgery.midtraining.evaluation.resting import generators, resting
from surgery.midtraining.experts import EXPERTS, stand_in
from surgery.midtraining.loss import IGNORE, chunked_loss
from surgery.midtraining.mesh import apart
from surgery.midtraining.objections import largest_id, wasted
from surgery.midtraining.optimizer import named
from surgery.midtraining.parallel import World
from surgery.midtraining.precision import Precision
from surgery.midtraining.routers import BIAS, MLP, by_kind
from surgery.midtraining.step import gradients, hidden_states
from surgery.running.device import Device
from surgery.running.layerwise import forward

if TYPE_CHECKING:
    from surgery.midtraining.loop import Job

TOKENS = 256  # of a row that is looked at
ROWS = 2
FP32 = Precision("fp32", "")
# How far two ways to compute the same may lie apart, in standard deviations: in fp32, with products in bf16, in fp8.
EXACT, ROUNDED, COARSE = 1e-4, 0.1, 0.3
MESH = 1e-4  # gradients of several processes and of one, relative to their norm
LOSS = {"fp32": 1e-4, "autocast": 0.03, "bf16": 0.03, "fp8": 0.1}  # and two losses, relatively
STORED_ROUNDED = ("bf16", "fp8")  # whose products are rounded whatever autocast says


class Failed(Exception):
    """A test found what it looks for; the text says what."""


@dataclass(frozen=True)
class Result:
    """`detail` says what was compared, or why the test was not needed."""

    name: str
    passed: bool
    detail: str
    seconds: float


Tell = Callable[[Result], None]


def silent(_: Result) -> None:
    """Tells nobody."""


def self_test(job: Job, tell: Tell = silent) -> list[Result]:
    """Run all tests that the settings do not leave out.  Raises MismatchError at the first that fails."""
    skip = job.run.skip_self_tests
    if unknown := [name for name in skip if name not in (*TESTS, MOVED)]:
        hint = f"tests: {', '.join(TESTS)}, {MOVED}"
        raise UsageError(f"skip_self_tests: there is no test {some(unknown)}", hint=hint)
    part = sample(job)
    with torch.random.fork_rng(devices=generators()):
        wanted = {name: partial(test, job, part) for name, test in TESTS.items() if name not in skip}
        return [_run(name, test, tell, job.world) for name, test in wanted.items()]


def _run(name: str, test: Callable[[], str], tell: Tell, world: World) -> Result:
    """What the test says in the first process; it fails in all of them if it does in one."""
    begun = time.perf_counter()
    try:
        said, failed = test(), ""
    except Failed as failure:
        said = failed = str(failure)
    worst = next((text for text in parallel.everyone(world, failed) if text), "")
    result = Result(name, not worst, worst or said, time.perf_counter() - begun)
    tell(result)
    if worst:
        hint = f"nothing was trained; to go on in spite of it: skip_self_tests: [{name}]"
        raise MismatchError(f"self-test {name}: {worst}", hint=hint)
    return result


def sample(job: Job) -> MicroBatch:
    """The beginning of the first rows that the run will see; every place has a label if they have none."""
    rows = rows_of(job.batches, job.course.layout, 0, job.world.rank, job.world.size)
    part = next(micro_batches(rows, ROWS, job.world.device))
    tokens, labels = (t[:, :TOKENS].contiguous() for t in (part.tokens, part.labels))
    if not (labels != IGNORE).any():
        labels = _next(tokens)
    positions = None if part.positions is None else part.positions[:, :TOKENS].contiguous()
    return replace(part, tokens=tokens, labels=labels, positions=positions, learnt=_count(labels))


def _count(labels: torch.Tensor) -> int:
    return int((labels != IGNORE).sum())


def _next(tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORE)], 1)


@torch.no_grad()
def _hidden(job: Job, part: MicroBatch, exact: bool) -> torch.Tensor:
    """Hidden states; `exact`: in fp32, else in the run's precision."""
    precision = FP32 if exact else job.objective.precision
    with resting(job.model), precision.computing(job.world.device):
        return hidden_states(job.model, part, job.objective.across).float()


def _same(job: Job, pair: Callable[[bool], tuple[torch.Tensor, torch.Tensor]], what: str) -> str:
    """Compare two ways to get hidden states: exactly, if the weights are fp32, and in the run's precision.

    Where products are rounded, a router may choose otherwise now and then, so the median over places counts.
    """
    name = job.objective.precision.name
    found = [] if name in STORED_ROUNDED else [(float(_apart(*pair(True)).max()), EXACT)]
    rounded = COARSE if name == "fp8" else ROUNDED
    found += [] if name == "fp32" else [(float(_apart(*pair(False)).median()), rounded)]
    for far, limit in found:
        if not far <= limit:
            raise Failed(f"{what} by {far:.2g} standard deviations")
    return f"apart by {max(far for far, _ in found):.1e} standard deviations"


def _apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How far each place of `a` [rows, places, ...] is from that of `b`: root mean square, in standard deviations."""
    return (a - b).flatten(2).square().mean(-1).sqrt() / b.std().clamp(min=1e-30)


# --------------------------------------------------------------------------------------------------------------- tests


def rates(job: Job, part: MicroBatch) -> str:
    """The first steps have a learning rate."""
    schedule, expected = job.course.schedule, wasted(job.course)
    first = next((s for s in range(1, job.course.layout.steps + 1) if s not in expected), 1)
    if not schedule(first) > 0:
        raise Failed(f"the learning rate of step {first} is {schedule(first):g}")
    also = f"; step {expected[0]} has none, as this convention counts" if expected else ""
    return f"step {first} has a learning rate of {schedule(first):.3g}{also}"


def vocabulary(job: Job, part: MicroBatch) -> str:
    """Ids are rows of the embedding, and the tokenizer is the model's; else the model must know the data."""
    size = len(job.model.get_input_embeddings().weight)
    largest = largest_id(job.course, job.batches, job.world.rank, job.world.size)
    if largest >= size:
        raise Failed(f"the data hold the id {largest:,}, and the model has {size:,} ids")
    return f"the largest id is {largest:,} of {size:,}; {_tokenizer(job, part, size)}"


def _tokenizer(job: Job, part: MicroBatch, size: int) -> str:
    plan, found = getattr(job.batches, "plan", None), job.source.tokenizer
    theirs = plan.file.fingerprint.get("tokenizer") if plan else None
    path = found.files.get("tokenizer.json") if found else None
    ours = hashlib.sha256(path.read_bytes()).hexdigest() if path else None
    if theirs and theirs == ours:
        return "the data's tokenizer is the model's"
    loss, guess = _loss(job, part), math.log(size)
    says = f"the model's loss is {loss:.2f}, by guessing it would be {guess:.2f}"
    if theirs and ours and loss > guess:
        raise Failed(f"the data were made with another tokenizer than the model's, and {says}")
    return f"{'their tokenizers differ as files' if theirs and ours else 'their tokenizer is not known'}; {says}"


def _loss(job: Job, part: MicroBatch) -> float:
    """Of the hidden states through the head, in fp32 if the weights are."""
    out = job.model.get_output_embeddings()
    with torch.no_grad():
        return _cross_entropy(out(_hidden(job, part, True).to(out.weight.dtype)), part.labels)


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    flat = labels.reshape(-1).to(logits.device)
    logits = logits.reshape(len(flat), -1).float()
    nats = torch.nn.functional.cross_entropy(logits, flat, ignore_index=IGNORE, reduction="sum")
    return float(nats) / _count(flat)


def causality(job: Job, part: MicroBatch) -> str:
    """What comes later does not change what came before."""
    middle = part.tokens.shape[1] // 2
    changed = part.tokens.clone()
    changed[:, middle:] = (changed[:, middle:] + 1) % len(job.model.get_input_embeddings().weight)

    def pair(exact: bool) -> tuple[torch.Tensor, torch.Tensor]:
        after, before = _hidden(job, replace(part, tokens=changed), exact), _hidden(job, part, exact)
        if torch.equal(after[:, middle:], before[:, middle:]):
            raise Failed("tokens have no effect at all")
        return after[:, :middle], before[:, :middle]

    return _same(job, pair, "other tokens later in a row change earlier places")


def isolation(job: Job, part: MicroBatch) -> str:
    """Documents of a row do not see each other, where the plan isolates them."""
    if part.positions is None or job.objective.across:
        return "not needed: documents of a row see each other here"
    half = part.tokens.shape[1] // 2
    count = torch.arange(half, device=part.tokens.device).expand(len(part.tokens), half)
    packed = replace(part, tokens=part.tokens[:, : 2 * half], positions=torch.cat([count, count], 1))
    alone = replace(part, tokens=part.tokens[:, half : 2 * half].contiguous(), positions=None)
    what = "the second document of a row sees the first: it changes"
    return _same(job, lambda exact: (_hidden(job, packed, exact)[:, half:], _hidden(job, alone, exact)), what)


@torch.no_grad()
def head(job: Job, part: MicroBatch) -> str:
    """The loss from hidden states is that of the model's own logits."""
    weight, name = job.model.get_output_embeddings().weight, job.objective.precision.name
    hidden = _hidden(job, part, True).to(weight.dtype)
    found = float(chunked_loss(hidden, weight, part.labels, part.learnt)[1])
    with resting(job.model):
        wanted = _cross_entropy(
            job.model(input_ids=part.tokens, position_ids=part.positions, use_cache=False).logits, part.labels
        )
    if not job.objective.across and not abs(found - wanted) <= LOSS[name] * max(1.0, wanted):
        raise Failed(f"the loss from hidden states is {found:.5f}, that of the model's own logits {wanted:.5f}")
    return f"{found:.5f}, by the model's own logits {wanted:.5f}"


def experts(job: Job, part: MicroBatch) -> str:
    """The experts' backend computes what the plain loop does, forward and backward."""
    mixtures = by_kind(job.objective.routers.mixtures).get(MLP) if job.objective.routers else None
    if not mixtures:
        return "not needed: the mlp is dense"
    module = mixtures[0].experts
    given: list[tuple[torch.Tensor, ...]] = []
    handle = module.register_forward_pre_hook(lambda _, args: given.append(args))
    try:
        _hidden(job, part, False)
    finally:
        handle.remove()
    (x, chosen, weights), run = given[0], module
    if job.world.size > 1:  # the module's own weights are divided: others of its shapes, whole
        module = stand_in(module)
        chosen, run = chosen % module.num_experts, partial(EXPERTS[job.choices["experts"]].run, module)
    by = (run, partial(EXPERTS["loop"].run, module))
    ours, plain = (_computed(job, module, (x, chosen, weights), each) for each in by)
    apart = {name: float(_apart(a[None], plain[name][None]).max()) for name, a in ours.items()}
    worst = max(apart, key=lambda name: apart[name])
    if not apart[worst] <= (EXACT if job.objective.precision.name == "fp32" else ROUNDED):
        raise Failed(f"the {worst} differ from the plain loop's by {apart[worst]:.2g} standard deviations")
    return f"apart from the plain loop by {apart[worst]:.1e} standard deviations"


def _computed(
    job: Job, module: Any, args: tuple[torch.Tensor, ...], run: Callable[..., torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What experts make of these arguments, and the gradients of a weighted sum of it."""
    x, chosen, weights = args
    x, weights = (t.detach().clone().requires_grad_() for t in (x, weights))
    wanted = {"gradients of tokens": x, "gradients of weights": weights}
    wanted |= {f"gradients of {n}": p for n, p in module.named_parameters() if p.requires_grad}
    with job.objective.precision.computing(job.world.device):
        y = run(x, chosen, weights)
    by = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y).to(y.dtype)
    grads = torch.autograd.grad(y, list(wanted.values()), by, allow_unused=True)
    found = [(n, torch.zeros_like(wanted[n]) if g is None else g) for n, g in zip(wanted, grads, strict=True)]
    return {name: t.detach().float() for name, t in [("outputs", y), *found]}


def conversion(job: Job, part: MicroBatch) -> str:
    """The loaded model's loss is that of the source, run layer by layer straight from its files in fp32."""
    if job.begun:
        return "not needed: the weights are those of a checkpoint, whose digests have been compared"
    tokens = part.tokens[:1, :64].contiguous()
    row = replace(part, tokens=tokens, labels=_next(tokens), positions=None)
    logits = forward(job.start.begun(job.source), tokens.cpu(), "float32", Device(job.world.device)).logits
    found, wanted = _loss(job, row), _cross_entropy(logits, row.labels)
    name = job.objective.precision.name
    limit = LOSS[name if name in STORED_ROUNDED else "fp32"]
    if not abs(found - wanted) <= limit * max(1.0, wanted):
        raise Failed(f"the model's loss is {found:.5f}, that of {job.source.path.name} itself {wanted:.5f}")
    return f"{found:.5f}, by {job.source.path.name} itself {wanted:.5f}"


def gradient(job: Job, part: MicroBatch) -> str:
    """A gradient reaches everything that is trained."""
    gradients(job.model, [part], replace(job.objective, telemetry={}), job.world)
    found = {name: p.grad for name, p in named(job.optimizer)}
    here = {name: torch.zeros(0) if g is None else parallel.local(g) for name, g in found.items()}
    reached = _anywhere(job, {name: bool(g.any()) for name, g in here.items()})
    odd = _anywhere(job, {name: not bool(g.isfinite().all()) for name, g in here.items()})
    job.optimizer.zero_grad()
    if none := [name for name in found if name not in reached]:
        raise Failed(f"no gradient reaches {len(none)} parameters: {some(none)}")
    if odd:
        raise Failed(f"the gradients of {len(odd)} parameters are not finite: {some(odd)}")
    return f"one reaches all {len(found)} parameters"


def mesh(job: Job, part: MicroBatch) -> str:
    """A small copy of the model, divided as the model is, has the gradients of one process."""
    if job.world.size == 1:
        return "not needed: there is one process"
    found = apart(job)
    worst = max(found, key=lambda name: found[name])
    if not found[worst] <= MESH:
        raise Failed(f"{worst} of a small copy of the model differs from that of one process by {found[worst]:.2g}")
    return f"{len(found)} gradients and losses of a small copy are those of one process, up to {found[worst]:.1e}"


def _anywhere(job: Job, holds: Mapping[str, bool]) -> list[str]:
    """The names of which it holds in any process: each has a part of what is divided."""
    counts = parallel.total(job.world, [float(each) for each in holds.values()])
    return [name for name, count in zip(holds, counts, strict=True) if count]


TESTS: Mapping[str, Callable[[Job, MicroBatch], str]] = {
    "learning_rate": rates,
    "vocabulary": vocabulary,
    "causality": causality,
    "isolation": isolation,
    "head": head,
    "experts": experts,
    "conversion": conversion,
    "mesh": mesh,
    "gradient": gradient,
}
MOVED = "update"  # made after the first step
BLOCK = 1 << 20  # elements whose bits are summed at once


# ------------------------------------------------------------------------------------------------------- after a step


def fingerprints(weights: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """A number for the bits of every tensor, or of what is here of it, to see later whether it has changed."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(1 << 63), (1 << 63) - 1, (BLOCK,), generator=generator)
    return {name: _bits(parallel.local(tensor), factors) for name, tensor in weights.items()}


def _bits(tensor: torch.Tensor, factors: torch.Tensor) -> int:
    """The sum of the bits, read as integers, times factors by place: a plain sum stays the same where Adam's first step
    moves as many elements up as down, all by the rate."""
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    factors = factors.to(tensor.device)
    blocks = tensor.contiguous().view(width).flatten().split(BLOCK)
    return sum((2 * i + 1) * int((block * factors[: len(block)]).sum()) for i, block in enumerate(blocks))


def moved(job: Job, before: Mapping[str, int], tell: Tell = silent) -> Result:
    """After a step with a learning rate: what is trained has changed, what is frozen has not.  Raises MismatchError."""

    def test() -> str:
        now, trained = fingerprints(job.weights()), {n for n, p in job.model.named_parameters() if p.requires_grad}
        changed = set(_anywhere(job, {name: now[name] != before[name] for name in before}))
        frozen = {n for n, p in job.model.named_parameters() if not (p.requires_grad or n.endswith(BIAS))}
        if still := sorted(trained - changed):
            raise Failed(f"{len(still)} parameters did not change in the first step: {some(still)}")
        if slipped := sorted(frozen & changed):
            raise Failed(f"{len(slipped)} frozen parameters changed: {some(slipped)}")
        return f"{len(trained)} parameters have changed" + (f", {len(frozen)} frozen ones have not" if frozen else "")

    return _run(MOVED, test, tell, job.world)

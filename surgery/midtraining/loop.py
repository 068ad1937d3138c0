"""Continued pretraining, from a run's settings to trained weights; read it from top to bottom.

    run, _ = read_run("run.yaml")
    job = prepare(run)                       # the model, its optimizer, the data and the course, ready to go
    state = fresh_state(job)                 # all that resuming needs, in one mapping
    train(job, state, log)                   # steps, each told to the log

Everything that enters a step is a small function or a mapping with a name; what depends on how many processes there are
lies in `parallel.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any, Protocol

import torch

from surgery.data.rows import RowSource
from surgery.errors import ConfigError
from surgery.formats.base import Checkpoint
from surgery.formats.registry import open_checkpoint
from surgery.midtraining import parallel
from surgery.midtraining.attention import attending, attention_for
from surgery.midtraining.balance import RULES, check_biases, nudge_biases, translate
from surgery.midtraining.batching import micro_batches, rows_of
from surgery.midtraining.checkpoint import Saved
from surgery.midtraining.clock import Clock
from surgery.midtraining.course import Course
from surgery.midtraining.experts import fastest_experts, keep_compiled_gemms, use_experts
from surgery.midtraining.export import check_exports
from surgery.midtraining.fp8 import use_fp8
from surgery.midtraining.model import allocate, build, fill, noise_of_source, weights_now
from surgery.midtraining.objections import check
from surgery.midtraining.optimizer import DECAYS, adamw, freeze, grouped, named, set_rate
from surgery.midtraining.parallel import World
from surgery.midtraining.precision import Masters, Precision, choose
from surgery.midtraining.preference import preference_of
from surgery.midtraining.recorded_rate import peak_rate
from surgery.midtraining.router_telemetry import Reading, RouterTelemetry, summary
from surgery.midtraining.routers import ATTENTION, MLP, Fp32Routers, Mixture, RouterLog, by_kind, find_mixtures
from surgery.midtraining.settings import Run
from surgery.midtraining.sharding import shard
from surgery.midtraining.skip_step import Spikes
from surgery.midtraining.sources import open_batches, said_of
from surgery.midtraining.start import Start, find_start, put_moments
from surgery.midtraining.step import Objective, gradients
from surgery.running.layerwise import with_family

ROUTER = {MLP: "router", ATTENTION: "attention_router"}  # what their numbers are called in a line of the log


class Log(Protocol):
    """Who is told of steps and events; see log.py."""

    def step(self, metrics: Mapping[str, Any], times: Mapping[str, Any]) -> None: ...
    def event(self, step: int, level: str, text: str) -> None: ...
    def routing(self, step: int, kind: str, reading: Mapping[str, Any]) -> None: ...


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    tokens: int = 0
    labels: int = 0

    def state_dict(self) -> dict[str, int]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        vars(self).update(state)


@dataclass(frozen=True, eq=False)
class Job:
    """All that a run needs and that no step changes, but for the model and its optimizer, which are also state."""

    run: Run
    world: World
    source: Checkpoint
    digest: str
    batches: RowSource
    course: Course
    objective: Objective
    model: Any
    optimizer: torch.optim.Optimizer
    start: Start
    masters: Masters | None = None
    notes: tuple[str, ...] = ()
    choices: dict[str, str] = field(default_factory=dict)  # what `auto` came to, for a run that goes on
    begun: int = 0  # the step that it goes on from

    @property
    def parameters(self) -> list[torch.Tensor]:
        """What is trained, and holds gradients."""
        return [tensor for _, tensor in named(self.optimizer)]

    def weights(self) -> dict[str, torch.Tensor]:
        """The model's weights as they are, by the names that they have in it."""
        masters = {id(held): master for held, master in self.masters.pairs} if self.masters else {}
        return weights_now(self.model, masters)


State = dict[str, Any]  # every value has state_dict and load_state_dict
Act = Callable[[Job, State], None]


# ----------------------------------------------------------------------------------------------------------- preparing


def prepare(run: Run, progress: Callable[[int], None] | None = None, saved: Saved | None = None) -> Job:
    """Open the source and the data, build the model and its optimizer.

    `progress` is told bytes of weights.  With a checkpoint of the run, weights and moments are still to be restored
    from it (`resuming.py`).  Raises SurgeryError if anything does not fit.
    """
    world, train = parallel.start(run.device), run.train
    source = with_family(open_checkpoint(run.model.path, format=run.model.format, options=run.model.options))
    if source.spec.experts:
        keep_compiled_gemms()
    with parallel.main_first(world):
        batches = open_batches(run)
    source, attention_notes = attending(run, source, batches.sequence_length)
    check_exports(run, source)
    start = Start(None, saved.note) if saved else find_start(run.init, source, run.model.options)
    peak, rate_note = saved.peak if saved else peak_rate(train.schedule, source, start.lr)
    course = Course.of(train, batches, world.size, peak)
    unusual = check(course, batches, source)
    choices = saved.choices(world.device) if saved else {}
    found = choose(choices.get("precision", train.precision), world.device)
    precision = Precision(*parallel.first(world, astuple(found)))
    choices["precision"] = precision.name

    torch.manual_seed(train.seed + world.rank)
    attention = attention_for(run.model.attention, world.device, precision)
    dtype = precision.weights if world.size == 1 else torch.float32
    model = build(source, dtype, world.device, attention=attention, dropout=train.dropout)
    if precision.name == "fp8":
        use_fp8(model)
    mixtures = find_mixtures(model)
    objective, moe_notes = objective_of(run, mixtures, precision, batches.sources)
    shard(model, mixtures, world, run.parallel, precision)
    if saved:
        allocate(model, world.device)
    digest = saved.digest if saved else fill(model, start.begun(source), world, progress)
    if train.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False}, int(train.activation_checkpointing))
    if MLP in by_kind(mixtures):
        tokens = course.micro * batches.sequence_length
        before = choices.get("experts") if run.model.experts == "auto" else None
        choices["experts"], why = choose_experts(run.model.experts, before, model, objective, world, tokens)
        moe_notes.append(why)
    if train.freeze:
        freeze(model, train.freeze)
    settings = train.optimizer
    groups = grouped(model, DECAYS[settings.decay], settings.weight_decay, settings.no_decay, settings.lr_scale)
    masters = Masters(groups) if dtype != torch.float32 else None
    optimizer = adamw(groups, settings.betas, settings.eps)
    if start.moments:
        put_moments(start.moments, optimizer, model, source, world)
    notes = (f"precision {precision.name}: {precision.why}", rate_note, start.note, *said_of(run, batches),
             *noise_of_source(source, train.dropout), *unusual, *attention_notes, *moe_notes)  # fmt: skip
    return Job(run, world, source, digest, batches, course, objective, model, optimizer, start, masters, notes, choices,
               saved.step if saved else 0)  # fmt: skip


def objective_of(
    run: Run, mixtures: Sequence[Mixture], precision: Precision, sources: Sequence[str]
) -> tuple[Objective, list[str]]:
    """What is minimised; for a mixture of experts also who listens to its routers, and what coefficients were made."""
    train, moe = run.train, run.moe
    plain = Objective(precision, train.z_loss, train.loss_divisor, train.loss_chunk, run.data.attend_across_documents,
                      preference=preference_of(run.objective))  # fmt: skip
    if not mixtures:
        return plain, []
    if moe.bias_rate:
        check_biases(mixtures)
    if moe.fp32_router:
        Fp32Routers(mixtures)
    coefficients, notes, kinds = [moe.balance, moe.router_z], list[str](), by_kind(mixtures)
    if moe.coefficients_of not in ("ours", moe.rule):
        if len(kinds) > 1:
            what = f"a coefficient of {moe.coefficients_of} is two of ours, the mlp's experts' and the attention's"
            raise ConfigError(f"moe.coefficients_of: {what}",
                              hint=f"moe: {{rule: {moe.coefficients_of}}} takes its losses")  # fmt: skip
        balance, said = translate(moe.balance, moe.coefficients_of, top_k=mixtures[0].top_k, layers=len(mixtures))
        router_z, also = translate(moe.router_z, moe.coefficients_of, top_k=mixtures[0].top_k, layers=len(mixtures),
                                   z_loss=True)  # fmt: skip
        coefficients, notes = [balance, router_z], [f"moe.balance: {said}", f"moe.router_z: {also}"]
    if ATTENTION in kinds and train.compile is True:
        notes.append("train.compile: nothing is compiled, as groups of heads are experts")
    telemetry = {kind: RouterTelemetry([m.layer for m in alike], sources) for kind, alike in kinds.items()}
    return replace(plain, balance=coefficients[0], router_z=coefficients[1], rule=RULES[moe.rule],
                   routers=RouterLog(mixtures), telemetry=telemetry), notes  # fmt: skip


def choose_experts(
    wanted: str, before: str | None, model: Any, objective: Objective, world: World, tokens: int
) -> tuple[str, str]:
    """Run the experts by a backend, by the one `before` if the run had chosen it; says which, and why."""
    assert objective.routers
    mixtures = by_kind(objective.routers.mixtures)[MLP]
    wanted, why = before or wanted, f"experts by {before or wanted}, as the {'run began' if before else 'settings say'}"
    if wanted == "auto":
        with objective.precision.computing(str(mixtures[0].weight.device)):
            choice = fastest_experts(mixtures[0], tokens)
        wanted, why = parallel.first(world, [choice.name, f"experts by {choice}"])
    use_experts(model, mixtures, wanted)
    return wanted, why


def fresh_state(job: Job) -> State:
    """All that resuming needs; every value has `state_dict` and `load_state_dict`."""
    skip = job.run.train.skip_step
    spikes = Spikes(skip.sigma, skip.window, skip.abort_after) if skip else Spikes(None, abort_after=1)
    return {"model": job.model, "optimizer": job.optimizer, "progress": Progress(), "spikes": spikes}


# ------------------------------------------------------------------------------------------------------------ training


def train(job: Job, state: State, log: Log, after: Sequence[Act] = ()) -> None:
    """Take all steps that are left.

    `after` are called after every step: to evaluate, to save, to export.
    """
    progress, spikes, layout = state["progress"], state["spikes"], job.course.layout
    while progress.step < layout.steps:
        clock = Clock()
        step = progress.step + 1
        rows = rows_of(job.batches, layout, step - 1, job.world.rank, job.world.size)
        parts = list(micro_batches(rows, job.course.micro_rows(step - 1), job.world.device))
        clock.lap("data")

        losses = gradients(job.model, parts, job.objective, job.world)
        norm = parallel.gradient_norm(job.world, job.parameters)
        clock.lap("compute")

        rate = job.course.schedule(step)
        reason = spikes.judge(losses["loss"], float(norm))
        if reason is None:
            update(job, rate, norm)
        else:
            log.event(step, "note", f"step {step} is left out: {reason}")
        job.optimizer.zero_grad()
        clock.lap("optimizer")

        progress.step, progress.tokens = step, progress.tokens + losses.pop("tokens")
        progress.labels += losses.pop("labels")
        metrics = {"step": step, "tokens": progress.tokens, **losses, "lr": rate, "grad_norm": float(norm),
                   "skipped": reason is not None}  # fmt: skip
        for kind, reading in routing(job).items():
            metrics[ROUTER[kind]] = summary(reading)
            log.routing(step, kind, reading)
        log.step(metrics, clock.times())
        for act in after:
            act(job, state)


def routing(job: Job) -> dict[str, Reading]:
    """What the routers of each kind did in this step; biases that choose experts are moved."""
    found, total = dict[str, Reading](), parallel.summing(job.world)
    for kind, telemetry in job.objective.telemetry.items():
        assert job.objective.routers
        if job.run.moe.bias_rate:
            mixtures = by_kind(job.objective.routers.mixtures)[kind]
            nudge_biases(mixtures, total(telemetry.counts()), job.run.moe.bias_rate)
        found[kind] = telemetry.read(total)
    return found


def update(job: Job, rate: float, norm: torch.Tensor) -> None:
    """Clip, set the rate, take the step."""
    limit = job.run.train.clip_norm
    if limit is not None:
        parallel.clip(job.parameters, limit, norm)
    set_rate(job.optimizer, rate)
    job.optimizer.step()
    if job.masters:
        job.masters.copy_back()

"""Find out by experiment why B's logits differ from A's.

    report = Search(a, b, folder_b, model_b, tokens, trace_a, 1e-5, print).explain(report)

Every round: run B with each module given A's own inputs, so that only the modules at fault differ; try every change
that could mend one of them; keep the best if it helps.  The measure is the sum of those modules' errors plus that of
the logits, so that two independent mistakes can be found one after the other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.conversion.convert import convert
from surgery.errors import SurgeryError
from surgery.formats.base import Checkpoint
from surgery.formats.hf.config import choose_family, write_config
from surgery.formats.operations import DTYPES
from surgery.model.spec import FIELDS, Spec
from surgery.running import whole as running
from surgery.running.loading import fits, load
from surgery.tensors.lazy import ITEMSIZE
from surgery.verification.configs import SIZES
from surgery.verification.report import Cause, Gap, LogitReport, Tell
from surgery.verification.trials import Score, Trial, config_trials, weight_trials
from surgery.verification.weights import Weights
from surgery.writing.scratch import scratch

if TYPE_CHECKING:
    import torch

ROUNDS = 4  # causes that are looked for one after the other
HELPS = 0.9  # a change counts if what is left is at most this share of the error
Best = tuple[Trial, Score] | None


class Search:
    """The state of one search: B as it is now, with the changes kept so far."""

    def __init__(
        self, a: Checkpoint, b: Checkpoint, folder: Path, model: Any, tokens: torch.Tensor, trace: running.Trace,
        tolerance: float, tell: Tell,
    ) -> None:  # fmt: skip
        self.a, self.b, self.folder, self.model = a, b, folder, model
        self.tokens, self.trace, self.tolerance, self.tell = tokens, trace, tolerance, tell
        self.spec = b.spec
        self.kept: dict[str, torch.Tensor] = {}
        self.head: torch.Tensor | None = None
        self.notes: list[str] = []
        self.tried = 0
        self.roomy = fits(2 * b.spec.parameters())
        self.weights = self._see(model)

    def explain(self, report: LogitReport) -> LogitReport:
        """The report with the places and the causes."""
        sizes = [FIELDS[name].label for name in self.a.spec.differences(self.b.spec) if name in SIZES - {"vocab"}]
        score = self._score(self.model)
        alone = tuple(Gap(n, running.place(n), g) for n, g in score.alone.items())
        if sizes:
            note = f"no cause was looked for: the models differ in size ({', '.join(sizes)})"
            return replace(report, alone=alone, notes=(*report.notes, note))
        causes: list[Cause] = self._rounding(score)
        while not any(c.explains for c in causes) and score.relative > self.tolerance and len(causes) < ROUNDS:
            best = self._best(score)
            if best is None:
                break
            trial, after = best
            mended = tuple(running.places(n for n in score.alone if n not in after.alone))
            solved = after.relative <= self.tolerance
            causes.append(Cause(trial.cause, trial.kind, mended, score.max_diff, after.max_diff, solved))
            score = self._keep(trial)
        if score.relative > self.tolerance and not any(c.explains for c in causes):
            self.notes.append(f"what is left unexplained: the logits still differ by {score.max_diff:.2g}")
        return replace(report, alone=alone, causes=tuple(causes), tried=self.tried,
                       notes=(*report.notes, *self.notes))  # fmt: skip

    # ------------------------------------------------------------------------------------------------ experiments

    def _score(self, model: Any) -> Score:
        free = running.run(model, self.tokens)
        forced = running.run(model, self.tokens, self.trace)
        width = min(self.trace.logits.shape[-1], free.logits.shape[-1])
        x, y = self.trace.logits[..., :width], free.logits[..., :width]
        gaps = running.gaps(self.trace.outputs, forced.outputs)
        alone = {n: g for n, g in gaps.items() if g > self.tolerance and not _whole_layer(n)}
        return Score(running.farthest(x, y), running.gap(x, y), alone)

    def _best(self, score: Score) -> Best:
        """The trial that helps most; the first one that mends everything ends the round."""
        best = self._pick(config_trials(self.a.spec, self.spec), score, None)
        if best is None or best[1].relative > self.tolerance:
            self._ready()
            best = self._pick(weight_trials(self.a, self.spec, self.weights, score), score, best)
        return best

    def _pick(self, trials: Iterator[Trial], score: Score, best: Best) -> Best:
        for trial in trials:
            if trial.last and best is not None:
                break
            self.tell(f"trying: {trial.cause}")
            try:
                after = self._try(trial)
            except SurgeryError as error:
                self.notes.append(f"could not try {trial.cause}: {error.what}")
                continue
            if after is None or not after.total <= HELPS * score.total:
                continue
            if best is None or after.total < 0.99 * best[1].total:
                best = trial, after
            if after.relative <= self.tolerance:
                break
        return best

    def _try(self, trial: Trial) -> Score | None:
        """The score with a change, None if it changes nothing."""
        if trial.spec is not None:
            self.tried += 1
            if not self.roomy:
                self.model = self.weights = None
            return self._score(self._variant(trial.spec))
        if trial.head:
            self.tried += 1
            with _head(self.model, self._a_head()):
                return self._score(self.model)
        assert trial.parts is not None and self.weights is not None
        changes = self._news(trial.parts())
        if not changes:
            return None
        self.tried += 1
        with self.weights.tried(changes):
            return self._score(self.model)

    def _keep(self, trial: Trial) -> Score:
        if trial.spec is not None:
            self.model, self.spec = None, trial.spec
            self._ready()
        elif trial.head:
            self.head = self._a_head()
            _set_head(self.model, self.head)
        else:
            assert trial.parts is not None and self.weights is not None
            changes = self._news(trial.parts())
            self.kept.update(changes)
            self.weights.keep(changes)
        return self._score(self.model)

    def _ready(self) -> None:
        """Load B as it is now, if it is not in memory."""
        if self.model is None:
            self.weights = None
            self.model = self._variant(self.spec)
            self.weights = self._see(self.model)

    def _news(self, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch

        assert self.weights is not None
        held = self.weights.parts
        flat = {n: t.reshape(held[n].shape).float() for n, t in parts.items()}
        return {n: t.clone() for n, t in flat.items() if not torch.equal(held[n].full(), t)}  # t may be B's own memory

    def _rounding(self, score: Score) -> list[Cause]:
        """Whether one side is the other one in a narrower dtype: the wider one, rounded, must give the same logits."""
        narrow = {DTYPES[short]: short for short in DTYPES}
        a_is_wider = ITEMSIZE[self.a.dtype] > ITEMSIZE[self.b.dtype]
        kind = self.b.dtype if a_is_wider else self.a.dtype
        if ITEMSIZE[self.a.dtype] == ITEMSIZE[self.b.dtype] or kind not in narrow:
            return []
        wide, names = (self.a, "B's weights are A's") if a_is_wider else (self.b, "A's weights are B's")
        self.tell(f"trying: {names} rounded to {kind}")
        with scratch("rounded") as folder:
            convert(wide.path, folder / "r", to="hf", from_=wide.format, dtype=narrow[kind], verify=False)
            logits = running.run(load(folder / "r"), self.tokens).logits
        self.tried += 1
        other = running.run(self.model, self.tokens).logits if a_is_wider else self.trace.logits
        relative = running.gap(other, logits)
        if relative > self.tolerance:
            return []
        places = tuple(running.places(score.alone))
        after = running.farthest(other, logits) if other.shape == logits.shape else 0.0
        return [Cause(f"rounding: {names} in {kind}", "rounding", places, score.max_diff, after, True)]

    def _variant(self, spec: Spec) -> Any:
        """B's weights, with the changes kept so far, under another config."""
        if spec == self.b.spec:
            model = load(self.folder)
        else:
            model = self._reconfigured(spec)
        if self.kept:
            Weights(model, spec).keep(self.kept)
        if self.head is not None:
            _set_head(model, self.head)
        return model

    def _reconfigured(self, spec: Spec) -> Any:
        with scratch("variant") as folder:
            running.link(self.folder, self.folder.glob("*.safetensors"), folder)
            (folder / "config.json").unlink()
            config = write_config(spec, self.b.facts, self.b.dtype, choose_family(spec))
            (folder / "config.json").write_text(json.dumps(config))
            return load(folder)

    def _a_head(self) -> torch.Tensor:
        return self.a.parts["lm_head"].full().float()

    def _see(self, model: Any) -> Weights | None:
        try:
            return Weights(model, self.spec)
        except SurgeryError as error:
            self.notes.append(f"weights were not experimented with: {error.what}")
            return None


@contextmanager
def _head(model: Any, tensor: torch.Tensor) -> Iterator[None]:
    """A model with another head, for a while."""
    before = model.get_output_embeddings().weight
    _set_head(model, tensor)
    try:
        yield
    finally:
        model.get_output_embeddings().weight = before


def _set_head(model: Any, tensor: torch.Tensor) -> None:
    import torch

    rows = model.get_output_embeddings().weight.shape[0]
    model.get_output_embeddings().weight = torch.nn.Parameter(tensor[:rows], requires_grad=False)


def _whole_layer(name: str) -> bool:
    return name.startswith("layers.") and name.count(".") == 1

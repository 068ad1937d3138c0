"""Which models, or which weights, make the best soup on a held-out text: greedily, or by trying.

    tried = Tried(recipe, Soup(), Choosing(greedy=True, text="held-out.txt"), Path("merged.tried.jsonl"), print)
    best = greedy(tried)                    # a Recipe: keep only models that lower the loss (arXiv 2203.05482)
    best = search(tried, trials=20)         # a Recipe: the weights of the best of 20 trials

A candidate is merged into a temporary Hugging Face folder by the same code as any soup and run by transformers; its
loss goes into the log, one line of JSON each.  What is in the log is not run again, so that a search that was stopped
goes on where it was, and ends in the same soup.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from surgery.errors import ConfigError, FileError, show
from surgery.formats.topology import ONE_RANK
from surgery.merging import run
from surgery.merging.methods.registry import METHODS
from surgery.merging.reader import Reference
from surgery.merging.recipe import Recipe
from surgery.merging.references import locate
from surgery.merging.request import Choosing, Soup
from surgery.running.loss import loss_of
from surgery.storage.copies import here
from surgery.writing.scratch import scratch

Weights = Mapping[Reference, float]
SEED = 2203_05482


@dataclass
class Tried:
    """All candidates of one search and their losses, in the order in which they were tried."""

    recipe: Recipe
    request: Soup
    choosing: Choosing
    log: Path
    say: Callable[[str], None]
    losses: dict[str, float] = field(default_factory=dict)
    merged: int = 0  # how many were run now, not found in the log

    def __post_init__(self) -> None:
        s = self.recipe.slices
        if not self.recipe.whole or len(s) != 1:
            raise ConfigError("--greedy and --search choose among `models`; this file has slices or modules")
        if "weight" not in METHODS[self.recipe.method].input_names():
            raise ConfigError(f"{self.recipe.method} has no weights to choose")
        self._resume()

    @property
    def text(self) -> Path:
        assert self.choosing.text
        return here(self.choosing.text)

    @property
    def models(self) -> list[Reference]:
        """What is weighted: all models but the base of a method that has one."""
        based = METHODS[self.recipe.method].base != "ignored"
        return [s.model for s in self.recipe.slices[0].sources if not (based and s.model == self.recipe.base)]

    def given(self) -> dict[Reference, float]:
        """The weights of the YAML.  Raises ConfigError if they are not plain numbers."""
        out = {}
        for source in self.recipe.slices[0].sources:
            if source.model in self.models:
                value = source.settings.get("weight", self.recipe.outer.get("weight"))
                if type(value) not in (int, float):
                    raise ConfigError(f"the weight of {source.model} is {show(value)}, and only numbers are searched")
                out[source.model] = float(value)
        return out

    def with_weights(self, weights: Weights) -> Recipe:
        """The recipe with these models and weights only."""
        whole = self.recipe.slices[0]
        kept = [
            replace(s, settings={**s.settings, "weight": weights[s.model]}) if s.model in weights else s
            for s in whole.sources
            if s.model in weights or s.model not in self.models
        ]
        recipe = replace(self.recipe, slices=(replace(whole, sources=tuple(kept)),))
        if problem := METHODS[recipe.method].refuses(len(kept), recipe.base in [s.model for s in kept]):
            raise ConfigError(f"{recipe.method} {problem}, so its models cannot be chosen one by one")
        return recipe

    def loss(self, weights: Weights) -> float:
        """Of the soup with these weights, in nats per token: from the log, or measured."""
        key = json.dumps({str(m): w for m, w in weights.items()})
        if key not in self.losses:
            recipe = self.with_weights(weights)
            beside = self.log.absolute().parent
            with scratch("soup", beside) as temporary:
                folder = temporary / "candidate"
                hf = replace(self.request, to="hf", topology=ONE_RANK, options=None, verify=False, sync=False,
                             workers=1, shard=None)  # fmt: skip
                with run.prepared(recipe, hf) as plan:
                    run.carry_out(recipe, plan, folder, hf)
                value = loss_of(folder, self.text, self.choosing.tokens, self.choosing.device)
            self.losses[key] = value
            self.merged += 1
            self._append({"weights": json.loads(key), "loss": value})
        self.say(f"  {self.losses[key]:.4f}  {_named(weights)}")
        return self.losses[key]

    def to_json(self) -> dict[str, Any]:
        tried = [{"weights": json.loads(k), "loss": v} for k, v in self.losses.items()]
        return {"log": str(self.log), "text": str(self.text), "tried": tried, "measured_now": self.merged}

    def _identity(self) -> dict[str, str]:
        """What must be equal for logged losses to count."""
        digest = hashlib.sha256(
            repr((replace(self.recipe, text=""), self.request.arithmetic, self.choosing.tokens)).encode()
        )
        if not self.text.is_file():
            raise FileError("is no file", file=self.text, hint="--eval wants plain text that no model was trained on")
        digest.update(self.text.read_bytes())
        for model in self.recipe.models():
            folder = locate(model.model)
            stats = [(p.name, p.stat()) for p in sorted(folder.rglob("*")) if p.is_file()] if folder.is_dir() else []
            digest.update(repr([(name, s.st_size, s.st_mtime_ns) for name, s in stats]).encode())
        return {"search": digest.hexdigest(), "text": str(self.text)}

    def _resume(self) -> None:
        """Read the log of an earlier run, or begin one.  Raises ConfigError if it is another search's."""
        identity = self._identity()
        if not self.log.is_file():
            self._append(identity)
            return
        lines = self.log.read_text(errors="replace").splitlines()
        entries = []
        for line in lines:
            try:
                entries.append(json.loads(line))
            except ValueError:  # the line that was being written when the run was stopped
                continue
        if not entries or entries[0].get("search") != identity["search"]:
            raise ConfigError("is the log of another search (other models, weights or text)", file=self.log,
                              hint="remove it, or name another with --log")  # fmt: skip
        self.losses = {json.dumps(e["weights"]): e["loss"] for e in entries[1:] if "loss" in e and "weights" in e}
        if self.losses:
            self.say(f"{len(self.losses)} candidates were tried before ({self.log})")

    def _append(self, entry: Mapping[str, Any]) -> None:
        text = self.log.read_bytes() if self.log.is_file() else b""
        with self.log.open("ab") as file:
            file.write((b"\n" if text and not text.endswith(b"\n") else b"") + json.dumps(entry).encode() + b"\n")


def _named(weights: Weights) -> str:
    return ", ".join(f"{w:g} x {m}" for m, w in weights.items())


def greedy(tried: Tried) -> Recipe:
    """Add the models one by one, the best alone first, and keep what does not raise the loss; weights as given."""
    given = tried.given()
    tried.say("each model alone:")
    alone = {m: tried.loss({m: given[m]}) for m in given}
    ranked = sorted(alone, key=lambda m: alone[m])
    kept, best = {ranked[0]: given[ranked[0]]}, alone[ranked[0]]
    tried.say("greedily, best first:")
    for model in ranked[1:]:
        candidate = {m: given[m] for m in given if m in kept or m == model}
        loss = tried.loss(candidate)
        if loss <= best:
            kept, best = candidate, loss
    _compare(tried, best, kept, min(alone.values()), ranked[0])
    return tried.with_weights(kept)


def search(tried: Tried, trials: int) -> Recipe:
    """The best of `trials` weightings around the best so far, begun with each model alone, the YAML's and the mean.

    A random step multiplies every weight; its size grows when it helps and shrinks when it does not.  Seeded, so that
    the same trials follow from the same losses.
    """
    given = tried.given()
    tried.say("each model alone:")
    alone = {m: tried.loss({m: given[m]}) for m in given}
    first = min(alone, key=lambda m: alone[m])
    tried.say("weights:")
    starts = [given, dict.fromkeys(given, 1.0)]
    losses = [(tried.loss(w), i) for i, w in enumerate(starts)]
    best, place = min(losses)
    kept, step, rng = starts[place], 0.5, random.Random(SEED)
    for _ in range(trials):
        moved = {m: w * math.exp(step * rng.gauss(0, 1)) for m, w in kept.items()}
        scale = sum(abs(w) for w in kept.values()) / sum(abs(w) for w in moved.values())
        candidate = {m: round(w * scale, 4) for m, w in moved.items()}
        loss = tried.loss(candidate)
        step = min(2.0, step * 1.5) if loss < best else max(0.02, step * 0.85)
        if loss < best:
            kept, best = candidate, loss
    _compare(tried, best, kept, alone[first], first)
    return tried.with_weights(kept)


def _compare(tried: Tried, best: float, kept: Weights, single: float, model: Reference) -> None:
    verdict = "lower than" if best < single else "no lower than"
    tried.say(f"the soup: {best:.4f} with {_named(kept)}")
    tried.say(f"          {abs(single - best):.4f} {verdict} the best single model, {model} ({single:.4f})")

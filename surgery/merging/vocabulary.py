"""Models with different tokenizers: their embeddings and heads brought to the rows of one, token by token.

    alignment = Alignment.build(recipe, opened, scratch)
    alignment.rows, alignment.tokenizer
    alignment.apply({model: embedding, ...}, base)          # each with `rows` rows, in the same order

A token that a model lacks gets the row of the base, of the only model that has it, or the mean of those that have
it; `tokenizer: tokens:` says otherwise.  mergekit 0.1.5, `tokenizer/build.py` and `tokenizer/embed.py`; there, ids of
a union follow the order of sets and may differ from run to run, here they follow the order of the file.
"""

from __future__ import annotations

import bisect
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import ConfigError, show, some
from surgery.formats.base import Checkpoint
from surgery.merging import tokens
from surgery.merging.reader import Reference
from surgery.merging.recipe import Recipe, TokenRule
from surgery.merging.references import locate
from surgery.tensors.lazy import Box, Lazy, lengths, whole
from surgery.tokenizer import Tokenizer, find
from surgery.tokenizer.files import vocabulary

if TYPE_CHECKING:
    import torch

Origin = tuple[tuple[int, int], ...]  # (which source, which row): one, several to average, or none for zeros
WHOLE = 1 << 22  # elements up to which a mean is torch's own


class Rows(Lazy):
    """Rows of several tensors: row i is that of `origins[i]`; the last `padding` rows are the mean of all others."""

    __slots__ = ("_lock", "_mean", "dtype", "origins", "shape", "srcs", "starts")

    def __init__(self, srcs: Sequence[Lazy], origins: Sequence[Origin], padding: int) -> None:
        self.srcs, self.origins, self.dtype = tuple(srcs), origins, srcs[0].dtype
        self.shape = (len(origins) + padding, *srcs[0].shape[1:])
        self._mean: torch.Tensor | None = None
        self._lock = threading.Lock()  # blocks are read in several threads
        self.starts = [i for i in range(len(origins)) if not i or not _follows(origins[i - 1], origins[i])]
        self.starts += [len(origins)] * bool(padding)

    def sources(self) -> tuple[Lazy, ...]:
        return self.srcs

    def read(self, box: Box) -> torch.Tensor:
        import torch

        (first, last), rest = box[0], box[1:]
        out = torch.zeros(lengths(box), dtype=self.torch_dtype)
        at, count = first, len(self.origins)
        while at < last:
            place = bisect.bisect_right(self.starts, at)
            stop = min(last, self.starts[place] if place < len(self.starts) else self.shape[0])
            target = out[at - first : stop - first]
            if at >= count:
                target.copy_(self.mean()[(slice(None), *(slice(a, b) for a, b in rest))].expand_as(target))
            elif len(origin := self.origins[at]) == 1:
                source, row = origin[0]
                target.copy_(self.srcs[source].read(((row, row + stop - at), *rest)))
            else:
                for source, row in origin:
                    target += self.srcs[source].read(((row, row + 1), *rest))
                target /= max(1, len(origin))
            at = stop
        return out

    def mean(self) -> torch.Tensor:
        """The mean of all rows that belong to tokens, as one row."""
        with self._lock:
            if self._mean is None:
                self._mean = self._mean_row()
            return self._mean

    def _mean_row(self) -> torch.Tensor:
        import torch

        count, inner = len(self.origins), math.prod(self.shape[1:])
        rest, step = whole(self.shape)[1:], max(1, WHOLE // max(1, inner))
        if count <= step:
            return torch.mean(self.read(((0, count), *rest)), dim=0, keepdim=True)
        sums = [self.read(((i, min(i + step, count)), *rest)).double().sum(0) for i in range(0, count, step)]
        return (torch.stack(sums).sum(0, keepdim=True) / count).to(self.torch_dtype)


def _follows(a: Origin, b: Origin) -> bool:
    """Whether two rows are neighbours in one source."""
    return len(a) == len(b) == 1 and a[0][0] == b[0][0] and a[0][1] + 1 == b[0][1]


@dataclass(frozen=True)
class Alignment:
    """`vocab`: the merge's token -> id; `names`: the same of every model, as far as it has rows."""

    tokenizer: Tokenizer
    vocab: Mapping[str, int]
    rows: int
    names: Mapping[Reference, Mapping[str, int]]
    rules: Mapping[str, TokenRule]
    notes: tuple[str, ...]

    @staticmethod
    def build(recipe: Recipe, opened: Mapping[Reference, Checkpoint], scratch: Path) -> Alignment:
        """Read all tokenizers and make that of the merge.  Raises ConfigError."""
        wanted = recipe.vocabulary
        assert wanted is not None
        found, notes = _tokenizers(recipe, opened, scratch)
        base = found[recipe.donor]
        names = {m: tokens.known(t, opened[m].spec.vocab) for m, t in found.items()}
        extra = list(wanted.rules)
        if wanted.source == "union":
            others = [(t, opened[m].spec.vocab) for m, t in found.items() if m != recipe.donor and t is not base]
            out, added = tokens.union(base, others, extra, scratch / "union")
            notes.append(f"the tokenizer is that of {recipe.donor} with {len(added)} more tokens of the other models")
        else:
            chosen = wanted.source if isinstance(wanted.source, Reference) else recipe.donor
            out, added = tokens.union(found.get(chosen) or _alone(chosen), [], extra, scratch / "union")
            notes.append(f"the tokenizer is that of {chosen}" + (f" with {some(map(show, added))}" if added else ""))
        vocab, _ = vocabulary(out)
        count = max(vocab.values(), default=-1) + 1
        step = wanted.multiple or 1
        if wanted.source == "base" and count > opened[recipe.donor].spec.vocab + len(added):
            notes.append(f"the tokenizer has more tokens than {recipe.donor} has rows; their rows are zeros")
        return Alignment(out, vocab, -(-count // step) * step, names, wanted.rules, tuple(notes))

    @property
    def count(self) -> int:
        return max(self.vocab.values(), default=-1) + 1

    def apply(self, sources: Mapping[Reference, Lazy], base: Reference | None) -> dict[Reference, Lazy]:
        """The same tensors with the rows of the merge.  All have one dtype.  Raises ConfigError naming a token."""
        models = list(sources)
        own = [self.names[m] for m in models]
        origins: list[list[Origin]] = [[()] * self.count for _ in models]
        for token, place in self.vocab.items():
            rows = [names.get(token, -1) for names in own]
            rule = self.rules.get(token)
            force = rule is not None and rule.force
            default: Origin = () if min(rows) >= 0 and not force else self._default(token, rule, rows, models, base)
            for i, row in enumerate(rows):
                origins[i][place] = ((i, row),) if row >= 0 and not force else default
        self._check(origins, models, sources)
        tensors = list(sources.values())
        return {m: Rows(tensors, o, self.rows - self.count) for m, o in zip(models, origins, strict=True)}

    def _default(
        self, token: str, rule: TokenRule | None, rows: Sequence[int], models: Sequence[Reference],
        base: Reference | None,
    ) -> Origin:  # fmt: skip
        """Where a token's row comes from in the models that lack it."""
        present = [(i, row) for i, row in enumerate(rows) if row >= 0]
        if rule is None:
            if base in models and rows[at := models.index(base)] >= 0:
                return ((at, rows[at]),)
            return tuple(present)
        if rule.kind == "zero":
            return ()
        if rule.model is None or rule.model not in models:
            named = f"{rule.model}, which is not merged" if rule.model else "no source, and not all models have it"
            raise ConfigError(f"tokenizer.tokens: {show(token)} has {named}")
        at = models.index(rule.model)
        row: Any = rows[at]
        if rule.kind == "row":
            row = rule.row if isinstance(rule.row, int) else self.names[rule.model].get(str(rule.row), -1)
        if row < 0:
            raise ConfigError(f"tokenizer.tokens: {rule.model} has no {show(rule.row or token)}")
        return ((at, row),)

    def _check(
        self, origins: Sequence[Sequence[Origin]], models: Sequence[Reference], sources: Mapping[Reference, Lazy]
    ) -> None:
        """Raise ConfigError where a rule names a row that a tensor does not have."""
        for origin in {o for own in origins for o in own if o}:
            for source, row in origin:
                if row >= sources[models[source]].shape[0]:
                    raise ConfigError(f"tokenizer.tokens: {models[source]} has no row {row}")

    def ids(self, donor: Reference, facts: Mapping[str, object]) -> dict[str, object]:
        """bos, eos and pad of the config under their ids in the merge's tokenizer; what it lacks is left out."""
        texts = {i: text for text, i in self.names[donor].items()}

        def moved(value: object) -> object:
            return self.vocab.get(texts.get(value, ""), None) if type(value) is int else None

        out: dict[str, object] = {}
        for key, value in facts.items():
            if key.endswith("_token_id") and value is not None:
                ids = [moved(v) for v in value] if isinstance(value, list) else moved(value)
                if ids is not None and (not isinstance(ids, list) or None not in ids):
                    out[key] = ids
        return out


def _alone(reference: Reference) -> Tokenizer:
    """The tokenizer in a folder whose model is not merged, or that holds no model."""
    folder = locate(reference.model)
    found = find(folder)
    if found is None or found.kind != "hf":
        raise ConfigError("tokenizer: source holds no tokenizer of Hugging Face's form", file=folder)
    return found


def _tokenizers(
    recipe: Recipe, opened: Mapping[Reference, Checkpoint], scratch: Path
) -> tuple[dict[Reference, Tokenizer], list[str]]:
    """The tokenizer of every model, the donor's first; a model without one is taken to have the donor's."""
    found: dict[Reference, Tokenizer] = {}
    notes: list[str] = []
    order = [recipe.donor, *(m for m in recipe.models() if m != recipe.donor)]
    for number, model in enumerate(order):
        own = opened[model].tokenizer
        if own is not None:
            found[model] = tokens.in_hf_form(own, opened[model].spec.vocab, scratch / f"tokenizer-{number}")
        elif model == recipe.donor:
            raise ConfigError(f"tokenizer is given, but {model} has none", hint="leave it out, or name another base")
        else:
            found[model] = found[recipe.donor]
            notes.append(f"{model} has no tokenizer; it is taken to be that of {recipe.donor}")
    return found, notes

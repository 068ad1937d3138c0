"""A merge as a lazy checkpoint: the donor's config and tokenizer, merged parts.

merged = derive(recipe, open_all(recipe.models()), "fp32", Engine(), scratch)
merged.parts["layers.0.attn.q"].full()       # computed now
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from surgery.formats.base import Checkpoint, Config
from surgery.merging.align_experts import aligned
from surgery.merging.assemble import assemble
from surgery.merging.depth import fitted
from surgery.merging.engine.pool import Engine
from surgery.merging.layers import depths_of, out_layers, span
from surgery.merging.padding import trimmed
from surgery.merging.recipe import Recipe
from surgery.merging.references import Opened
from surgery.merging.tokens import with_template
from surgery.merging.vocabulary import Alignment


def derive(recipe: Recipe, opened: Opened, arithmetic: str, engine: Engine, scratch: Path) -> Checkpoint:
    """`scratch` is a folder for a tokenizer that is made.  Raises SurgeryError."""
    for checkpoint in opened.values():
        if checkpoint.tokenizer:
            checkpoint.tokenizer.check_inside()
    opened, notes = _comparable(recipe, opened)
    alignment = Alignment.build(recipe, opened, scratch) if recipe.vocabulary else None
    what = "config" if alignment else "config and tokenizer"
    notes = [f"{what} of {recipe.donor}, {'the base model' if recipe.base else 'the first model named'}", *notes]
    notes += recipe.notes
    donor = opened[recipe.donor]
    spec, parts, told = assemble(recipe, opened, arithmetic, engine, alignment)
    made = replace(donor, spec=spec, parts=parts, config=_config(recipe, opened))
    notes += told
    if alignment:
        made = _with_tokenizer(made, recipe, alignment)
        notes += alignment.notes
    if recipe.chat_template:
        models = [c.tokenizer for c in opened.values()]
        found, note = with_template(made.tokenizer, recipe.chat_template, models, scratch / "chat")
        made = replace(made, tokenizer=found)
        notes.append(note)
    if not engine.loops:
        notes.append("numba is not there, so it takes several times as long: pip install 'checkpoint-surgery[merge]'")
    notes += [f"{model}: {note}" for model, checkpoint in opened.items() for note in checkpoint.notes]
    return replace(
        made,
        files=tuple(dict.fromkeys(f for c in opened.values() for f in c.files)),
        ignored={k: v for c in opened.values() for k, v in c.ignored.items()},
        notes=tuple(dict.fromkeys(notes)),
        stamps={path: stamp for c in opened.values() for path, stamp in c.stamps.items()},
    )


def _config(recipe: Recipe, opened: Opened) -> Config:
    """The donor's config, its lists by layer as long as the merge is deep."""
    donor, depths = opened[recipe.donor], depths_of(opened)
    if recipe.whole or donor.format != "hf":
        return donor.config
    first = [(layer.slice.sources[0], layer.offset) for layer in out_layers(recipe, depths)]
    return fitted(donor.config, [(opened[s.model].config, span(s, depths)[0] + offset) for s, offset in first])


def _comparable(recipe: Recipe, opened: Opened) -> tuple[Opened, list[str]]:
    """The models with the same rows, if that is a matter of padding, and their experts in the same order."""
    notes: list[str] = []
    if recipe.vocabulary is None:
        opened, notes = trimmed(opened)
    if recipe.align:
        opened, told = aligned(recipe, opened)
        notes += told
    return opened, notes


def _with_tokenizer(made: Checkpoint, recipe: Recipe, alignment: Alignment) -> Checkpoint:
    """The checkpoint with the tokenizer of the merge, and the ids of its tokens."""
    ids = alignment.ids(recipe.donor, made.facts)
    facts, config = ({k: v for k, v in d.items() if not k.endswith("_token_id")} | ids
                     for d in (made.facts, made.config))  # fmt: skip
    return replace(made, tokenizer=alignment.tokenizer, facts=facts, config=config)

"""Names of tensors without what training wraps around a model: prefixes of modules, and dictionaries around it.

    unwrapped({"_orig_mod.model.norm.weight": t})[0]                    # {"model.norm.weight": t}
    unwrapped({"state_dict.module.model.norm.weight": t})[0]            # likewise
    unwrapped({"layers.0.mlp.up_proj.weight": t})[0]                    # model.layers.0...: saved without its head

Of Hugging Face's names, all of which lie below a few roots.  What is not understood is left as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from surgery.errors import LayoutError, show
from surgery.tensors.lazy import Lazy

# torch.compile, FSDP, activation checkpointing, Lightning: modules anywhere in a name
_MODULES = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
# how names of a whole model begin; `model.model.` is a model in something that is called model
_ROOTS = r"(?:model|lm_head|gpt_neox|embed_out|transformer)\."
_ROOT = re.compile(rf"{_ROOTS}(?!{_ROOTS})")
# names of a model without its head, and where they lie in one that has it
_BARE = {
    re.compile(r"(?:layers\.\d+\.|embed_tokens\.|norm\.)"): "model.",
    re.compile(r"(?:layers\.\d+\.|embed_in\.|final_layer_norm\.)"): "gpt_neox.",
}
# dictionaries around a model, and modules that hold one: DDP, peft, TRL's heads, Lightning
_AROUND = ("", "module.", "model.", "state_dict.", "model_state_dict.", "base_model.model.", "pretrained_model.",
           "net.", "policy.", "actor.")  # fmt: skip
_STATES = re.compile(r"(?:optimi[sz]ers?|optim|optimizer_state\w*|(?:lr_)?schedulers?|ema|rng\w*)\.")


def unwrapped(tensors: Mapping[str, Lazy]) -> tuple[dict[str, Lazy], list[str]]:
    """Tensors under the names of the bare model, and a note that says what was taken off or put before.

    States of an optimizer are left out.  Raises LayoutError if two tensors get one name.
    """
    plain = {name: _MODULES.sub("", name) for name in tensors if not _STATES.match(name)}
    first = next(iter(plain.values()), "")
    some = [prefix for prefix in _prefixes() if first.startswith(prefix)]
    found: dict[str, str] = next((m for prefix in some if (m := _below(prefix, plain))), {})
    if all(old == new for old, new in found.items()):
        return dict(tensors), []
    out: dict[str, Lazy] = {}
    for old, new in found.items():
        if new in out:
            raise LayoutError(f"{show(old)} and another tensor both mean {show(new)}")
        out[new] = tensors[old]
    return out, [_note(found)]


def _prefixes() -> list[str]:
    """What may stand before every name, the shortest first."""
    return sorted({a + b + c for a in _AROUND for b in _AROUND for c in _AROUND}, key=lambda p: (p.count("."), p))


def _below(prefix: str, plain: Mapping[str, str]) -> dict[str, str] | None:
    """old -> new names if this prefix stands before all; None if it does not, or what follows is no model."""
    rest = {old: name[len(prefix) :] for old, name in plain.items() if name.startswith(prefix)}
    if not rest or len(rest) != len(plain):
        return None
    if all(_ROOT.match(name) for name in rest.values()):
        return rest
    for bare, root in _BARE.items():
        if all(bare.match(name) or _ROOT.match(name) for name in rest.values()):
            return {old: root + name if bare.match(name) else name for old, name in rest.items()}
    return None


def _note(found: Mapping[str, str]) -> str:
    old, new = next((old, new) for old, new in found.items() if old != new)
    return f"names in the files are not those of a bare model: {show(old)} was read as {show(new)}, and so on"

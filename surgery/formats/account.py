"""Account for all that lies in a checkpoint's folder and in its pickles: read, carried, left out by a rule, or named.

    beside(Path("run"), {Path("run/model.safetensors")}, ()).left    # {"optimizer.pt": "the optimizer's state ..."}
    inside(tree, {id(tensor)}, (Rule("epoch", "how far the run was"),))   # {"epoch": "how far the run was"}

What a rule does not know is named as unknown, so that nothing is lost in silence; a file that changes what programs
make of the weights is refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import ConfigError, show
from surgery.tensors.files import leads_out, size_of

if TYPE_CHECKING:
    from surgery.containers import Container

READ, ASIDE, CARRIED, NAMED, REFUSED = "read", "aside", "carried", "named", "refused"
UNKNOWN_FILE, UNKNOWN_ENTRY = "a file that is not known", "an entry that is not known"
DEPTH = 64  # containers in containers; below that an entry is named as a whole
_CARRIED_BYTES = 16 << 20


@dataclass(frozen=True)
class Rule:
    """What is known of files whose name, or entries of pickles whose path, a regular expression matches as a whole.

    `verdict`: read by the format | aside (of no interest: not mentioned) | carried along with a tokenizer | named in
    the report with the `reason` (entries by what a group of the pattern matches, if it has one) | refused.  The name
    of a folder ends in a slash.
    """

    pattern: str
    reason: str = ""
    verdict: str = NAMED

    def matches(self, path: str) -> bool:
        return re.fullmatch(self.pattern, path) is not None

    def entry(self, path: str) -> tuple[str, str]:
        """What the report says of an entry whose path matches: its name, and the reason."""
        found = re.fullmatch(self.pattern, path)
        return (found[1] if found and found.re.groups else path), self.reason


OPTIMIZER = "the optimizer's state, without which a run starts its moments anew (see --optimizer)"
SCHEDULER = "the scheduler's state, which is not converted"
RANDOM = "random states, which are not converted"
TRAINER = "the trainer's own state, which is not converted"
# what may lie beside the weights in any format; the formats' own rules come first
FILES: tuple[Rule, ...] = (
    Rule(r"surgery\.json|soup\.json|\.gitattributes|\.gitignore|\.DS_Store", verdict=ASIDE),
    Rule(r"(?:\.git|\.cache|\.huggingface|\.locks|\.ipynb_checkpoints|__pycache__)/", verdict=ASIDE),
    Rule(r"adapter_(?:config\.json|model\.\w+)", "an adapter, which programs apply to the weights", REFUSED),
    Rule(r"(?:LICEN[CS]E|NOTICE|USE_POLICY|COPYING)[\w.-]*|generation_config\.json", verdict=CARRIED),
    Rule(r"additional_chat_templates/", verdict=CARRIED),
    Rule(r"[\w.-]*optim[\w.-]*/?", OPTIMIZER),
    Rule(r"(?:lr_)?scheduler[\w.-]*", SCHEDULER),
    Rule(r"(?:rng_state|random_states)[\w.-]*", RANDOM),
    Rule(r"trainer_state\.json|training_args\.\w+|train(?:er)?(?:\.pt|/)|scaler\.pt|zero_to_fp32\.py|latest", TRAINER),
    Rule(r"(?:runs|logs|wandb|tensorboard)/|events\.out\.tfevents.*|[\w.-]+\.log", "logs of the training"),
    Rule(r"(?:checkpoint-|step|iter_|global_step)\d+[\w.-]*/|release/", "another checkpoint, which is not read"),
    Rule(r"[\w.-]+\.(?:bin|safetensors|pth|pt|h5|msgpack|gguf|onnx|ot)(?:\.index\.json)?|(?:original|onnx|coreml)/",
         "other weights, which are not read"),
    Rule(r"[\w.-]+\.py", "code, which is never run"),
    Rule(r"[\w.-]+\.(?:md|pdf|png|jpg)", "documentation of the source"),
)  # fmt: skip


@dataclass(frozen=True)
class Beside:
    """What lies beside the files that are read: what is left out, each with the reason, and what is carried along."""

    left: dict[str, str] = field(default_factory=dict)
    carried: dict[str, Path] = field(default_factory=dict)


def beside(root: Path, read: Collection[Path], rules: Iterable[Rule]) -> Beside:
    """Every file in the folders of `root` that hold files that are `read`, and in `root` itself.

    Raises ConfigError for a file that changes the model and that nothing here understands.
    """
    known, found = (*rules, *FILES), Beside()
    folders = {root} | {folder for path in read for folder in path.parents if root in folder.parents}
    left: list[tuple[str, str]] = []
    for path in sorted(path for folder in folders for path in folder.iterdir()):
        if path in read or path in folders:
            continue
        name = path.relative_to(root).as_posix() + "/" * path.is_dir()
        rule = next((r for r in known if r.matches(path.name + "/" * path.is_dir())), Rule(".*", UNKNOWN_FILE))
        if rule.verdict == REFUSED:
            hint = "merge it into the weights (`surgery soup` takes MODEL+ADAPTER), or take it away"
            raise ConfigError(f"{show(name)} lies beside the weights: {rule.reason}", file=root, hint=hint)
        if rule.verdict == CARRIED:
            carried = dict(_carried(path, name))
            foreign = {inner: file for inner, file in carried.items() if leads_out(file, root)}
            found.carried.update({inner: file for inner, file in carried.items() if inner not in foreign})
            left += [(show(inner)[1:-1], "it is a link out of the folder") for inner in foreign]
        elif rule.verdict == NAMED:
            left.append((show(name)[1:-1], rule.reason))
    found.left.update(summed_up(left))
    return found


def _carried(path: Path, name: str) -> Iterator[tuple[str, Path]]:
    """A small file, or those of a folder."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file() and size_of(file) <= _CARRIED_BYTES:
            yield name + file.name if path.is_dir() else name, file


def summed_up(left: Iterable[tuple[str, str]]) -> dict[str, str]:
    """(path, reason) of what is left out; paths that differ in numbers alone become one entry."""
    groups: dict[tuple[str, str], list[str]] = {}
    for path, reason in dict.fromkeys(left):
        groups.setdefault((re.sub(r"\d+", "N", path), reason), []).append(path)
    return {
        paths[0] if len(paths) == 1 else f"{template} ({len(paths)} times)": reason
        for (template, reason), paths in groups.items()
    }


def inside(container: Container, claimed: Collection[int], rules: Iterable[Rule]) -> list[tuple[str, str]]:
    """(path, reason) of every entry of a file that no tensor of the model (their ids are `claimed`) and no rule reads.

    Where nothing below an entry is known, the entry is named as a whole.
    """
    return _Walk(claimed, tuple(rules)).below(container.entries, "", 0)[1]


class _Walk:
    def __init__(self, claimed: Collection[int], rules: tuple[Rule, ...]) -> None:
        self.claimed, self.rules = claimed, rules
        self.met: dict[int, bool] = {}  # container -> whether something in it is known; False while it is looked at

    def below(self, node: Any, path: str, depth: int) -> tuple[bool, list[tuple[str, str]]]:
        """(whether something here is known, what is left out)"""
        if id(node) in self.met:
            return self.met[id(node)], []
        if rule := next((r for r in self.rules if depth and r.matches(path)), None):
            return True, [rule.entry(path)] if rule.verdict == NAMED and _holds_something(node) else []
        if not isinstance(node, (dict, list, tuple)) or not node or depth >= DEPTH:
            return False, [(path, UNKNOWN_ENTRY)] if _holds_something(node) else []
        self.met[id(node)] = False
        known, left = not depth, list[tuple[str, str]]()
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if id(value) in self.claimed:
                known = True
            else:
                below, more = self.below(value, _join(path, key), depth + 1)
                known |= below
                left += more
        self.met[id(node)] = known
        return known, left if known else [(path, UNKNOWN_ENTRY)] * bool(left)


def _holds_something(node: Any) -> bool:
    return node is not None and not (isinstance(node, (dict, list, tuple, str, bytes)) and not node)


def _join(path: str, key: object) -> str:
    text = show(key)[1:-1] if type(key) is str else show(key)
    return f"{path}.{text}" if path else text

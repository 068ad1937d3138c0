"""The files of a GPT-NeoX checkpoint, as DeepSpeed writes them, opened as tables of tensors per rank.

    found = find(Path("pythia-run"))           # follows `latest`
    stored = open_files(found)
    stored.shards[Rank(tp=1)]["2.attention.dense.weight"]

With pipeline parallelism (even of one stage) every layer has a file of its own and tensors get its number as a
prefix; without, each rank's `module` holds them under `sequential.N.`.  Sources: DeepSpeed runtime/pipe/module.py
(`ckpt_layer_path`), runtime/engine.py (`save_checkpoint`), GPT-NeoX megatron/checkpointing.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.containers import open_file
from surgery.containers.text import read_tracker, read_yaml
from surgery.containers.torch_zip import Tree
from surgery.errors import ConfigError, FileError, LayoutError, UsageError, show, some
from surgery.formats.base import Place, main_dtype
from surgery.formats.neox.config import merge
from surgery.formats.neox.releases import RELEASES, Evidence
from surgery.formats.topology import Rank
from surgery.tensors.extent import Extent
from surgery.tensors.lazy import Lazy

_LAYER = re.compile(r"layer_(\d{2,4})-model_(\d{2,3})-model_states\.pt")
_RANK = re.compile(r"mp_rank_(\d{2,4})_model_states\.pt")
_OPTIMIZER = re.compile(r"(bf16_|fp16_)?zero_pp_rank_\d+_mp_rank_\d+_optim_states\.pt")
MARK = "surgery"  # the entry of a rank file in which this program says which release it wrote for


@dataclass(frozen=True)
class Found:
    """The files of one iteration: layers by (number, tensor-parallel rank), and one per rank."""

    root: Path
    folder: Path
    layers: Mapping[tuple[int, int], Path]
    ranks: tuple[Path, ...]
    optimizer: tuple[Path, ...]
    configs: tuple[Path, ...]


@dataclass(frozen=True)
class Stored:
    """Every rank's tensors under the names of the format, the prefix of these, and what else the files say."""

    shards: Mapping[Rank, Mapping[str, Lazy]]
    prefix: str
    tp: int
    pp: int
    state: Mapping[str, Any]
    trees: tuple[Tree, ...]


def locate(folder: Path) -> Place | None:
    """A run's folder with its `latest`, or the folder of one iteration."""
    if _is_iteration(folder):
        return Place(folder, folder, (folder.parent,))
    found = sorted(p for p in folder.iterdir() if p.is_dir() and _is_iteration(p)) if _has_latest(folder) else []
    return Place(folder, folder, tuple(found)) if found else None


def _has_latest(folder: Path) -> bool:
    return (folder / "latest").is_file()


def _is_iteration(folder: Path) -> bool:
    if (folder / "layer_00-model_00-model_states.pt").is_file():
        return True
    return (folder / "mp_rank_00_model_states.pt").is_file() and any((folder / "configs").glob("*.y*ml"))


def find(root: Path, configs: str = "") -> Found:
    """The files of a run's latest iteration, or of the iteration that the folder is.

    `configs`: YAML files to take instead of the checkpoint's own, separated by commas.  Raises FileError.
    """
    folder = root
    if (root / "latest").is_file() and not _is_iteration(root):
        folder = root / read_tracker(root / "latest")
        if not folder.is_dir():
            raise FileError(f"points to {show(folder.name)}, which is no folder here", file=root / "latest",
                            hint="give the folder of an iteration that is there")  # fmt: skip
    names = {p.name: p for p in sorted(folder.iterdir()) if p.is_file()}
    sharded = [n for n in names if re.fullmatch(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt", n)]
    if sharded:
        raise FileError(f"weights are partitioned by ZeRO stage 3 ({some(sharded, 2)}), which is not read", file=folder,
                        hint="gather them where you trust the code: zero_to_fp32.py beside `latest`")  # fmt: skip
    layers = {(int(m[1]), int(m[2])): p for n, p in names.items() if (m := _LAYER.fullmatch(n))}
    ranks = {int(m[1]): p for n, p in names.items() if (m := _RANK.fullmatch(n))}
    experts = [n for n in names if "expert" in n]
    if experts:
        raise FileError(f"holds the experts of a mixture ({some(experts, 2)}), which is not read", file=folder)
    _complete(folder, layers, ranks)
    optimizer = tuple(p for n, p in names.items() if _OPTIMIZER.fullmatch(n))
    return Found(
        root, folder, layers, tuple(ranks[i] for i in sorted(ranks)), optimizer, _configs(root, folder, configs)
    )


def _complete(folder: Path, layers: Mapping[tuple[int, int], Path], ranks: Mapping[int, Path]) -> None:
    """Raise FileError for a gap in the numbers of ranks; gaps in the layers' show as missing tensors."""
    tps = {tp for _, tp in layers}
    gaps = [f"layer_{i:02d}-model_{tp:02d}-model_states.pt" for i in sorted({i for i, _ in layers})
            for tp in range(max(tps) + 1) if (i, tp) not in layers]  # fmt: skip
    gaps += [f"mp_rank_{i:02d}_model_states.pt" for i in range(max(ranks, default=-1) + 1) if i not in ranks]
    if gaps:
        raise FileError(f"{some(gaps)} missing", file=folder, hint="copy or download every rank's files")


def _configs(root: Path, folder: Path, given: str) -> tuple[Path, ...]:
    if given:
        paths = [Path(p) for p in given.split(",")]
        odd = [str(p) for p in paths if not p.is_file()]
        if odd:
            raise UsageError(f"-O config: there is no file {some(odd)}")
        return tuple(paths)
    for place in (folder / "configs", root / "configs"):
        found = sorted(p for p in place.glob("*.y*ml") if p.is_file()) if place.is_dir() else []
        if found:
            return tuple(found)
    raise FileError("holds no configs/*.yml, without which the weights do not say what the model is", file=folder,
                    hint="-O config=FILE.yml[,FILE.yml] takes the YAML files of the run from elsewhere")  # fmt: skip


def read_configs(found: Found) -> dict[str, object]:
    """All YAML files as one configuration."""
    return merge([(str(p), read_yaml(p, "configuration")) for p in found.configs])


def open_files(found: Found) -> Stored:
    """All tensors of all ranks, nothing of them read.  Raises FileError."""
    trees = [_tree(path) for path in found.ranks]
    state: Mapping[str, Any] = trees[0].root if trees else {}
    opened = list(trees)
    module = state.get("module")
    if found.layers:
        if module:
            raise FileError("holds the weights twice: in layer files and in mp_rank files", file=found.folder)
        shards: dict[Rank, dict[str, Lazy]] = {}
        for (index, tp), path in sorted(found.layers.items()):
            tree = _tree(path)
            opened.append(tree)
            shards.setdefault(Rank(tp=tp), {}).update({f"{index}.{k}": t for k, t in _plain(tree, tree.root).items()})
        pp, prefix = max(1, len(trees) // len(shards)), ""
    else:
        shards = {Rank(tp=i): _plain(tree, tree.root.get("module")) for i, tree in enumerate(trees)}
        pp, prefix = 0, "sequential."
    _check_ranks(found, state, len(shards))
    return Stored(shards, prefix, len(shards), pp, state, tuple(opened))


def _tree(path: Path) -> Tree:
    tree = open_file(path)
    if not isinstance(tree, Tree) or not isinstance(tree.root, dict):
        raise FileError("is no dictionary of torch.save", file=path)
    return tree


def _plain(tree: Tree, tensors: object) -> dict[str, Lazy]:
    """A flat dictionary of tensors; anything else in it is an error, never skipped."""
    if not isinstance(tensors, dict):
        raise FileError(f"'module' is {show(tensors)}, not a dictionary of tensors", file=tree.file.path,
                        hint="the weights of a pipeline are in layer_NN-model_NN-model_states.pt files")  # fmt: skip
    odd = [show(k) for k, t in tensors.items() if type(k) is not str or not isinstance(t, Extent)]
    if odd:
        raise FileError(f"entries {some(odd)} are no plain tensors", file=tree.file.path)
    return dict(tensors)


def _check_ranks(found: Found, state: Mapping[str, Any], tp: int) -> None:
    """The number of files must be what the run says of itself."""
    said = arguments(state).get("model_parallel_size")
    if type(said) is int and said != tp:
        raise FileError(f"holds files of {tp} tensor-parallel ranks, the run had {said}", file=found.folder,
                        hint="copy or download every rank's files")  # fmt: skip


def arguments(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The few arguments that GPT-NeoX stores with the weights."""
    args = state.get("args")
    return args if isinstance(args, dict) else {}


def check_arguments(state: Mapping[str, Any], config: Mapping[str, object], vocab: int, file: str) -> None:
    """Raise ConfigError where the stored arguments contradict the YAML files or the tensors."""
    args = arguments(state)
    for key in ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings"):
        if key in args and key in config and args[key] != config[key]:
            raise ConfigError(f"{key} is {show(config[key])}, but {show(args[key])} in the checkpoint", file=file,
                              hint="the YAML files are of another run")  # fmt: skip
    if args.get("padded_vocab_size") not in (None, vocab):
        rows = f"the embedding has {vocab} rows"
        raise ConfigError(
            f"padded_vocab_size is {show(args['padded_vocab_size'])} in the checkpoint, but {rows}", file=file
        )


def evidence(opened: Stored, folder: Path) -> Evidence:
    """What the names and shapes of the tensors show.  Raises LayoutError where they are not GPT-NeoX's."""
    first = opened.shards[Rank()]
    layer = f"{opened.prefix}2."
    mlp = next((m for m, name in _MLP.items() if f"{layer}mlp.{name[0]}.weight" in first), None)
    if mlp is None:
        raise LayoutError(f"{layer}mlp has no tensors that GPT-NeoX is known to have: {show(sorted(first)[:9])}"
                          if first else "no tensors are here", file=folder)  # fmt: skip
    up, down = _MLP[mlp]
    rows, inner = (
        _matrix(first, f"{layer}mlp.{up}.weight", folder)[0],
        _matrix(first, f"{layer}mlp.{down}.weight", folder)[1],
    )
    embedding = _matrix(first, f"{opened.prefix}0.word_embeddings.weight", folder)
    learned = first.get(f"{opened.prefix}0.position_embeddings.weight")
    buffer = first.get(f"{layer}attention.rotary_emb.inv_freq")
    name = re.compile(re.escape(opened.prefix) + r"\d+\.attention\.dense\.weight")
    return Evidence(
        layers=sum(1 for n in first if name.fullmatch(n)),
        mlp=mlp,
        gated=mlp == "w" or rows == 2 * inner,
        vocab=embedding[0] * opened.tp,
        ffn=inner * opened.tp,
        qkv_rows=_matrix(first, f"{layer}attention.query_key_value.weight", folder)[0] * opened.tp,
        qkv_bias=f"{layer}attention.query_key_value.bias" in first,
        o_bias=f"{layer}attention.dense.bias" in first,
        mlp_bias=f"{layer}mlp.{down}.bias" in first,
        head=any(name.endswith(".final_linear.weight") for name in first),
        positions=0 if learned is None else learned.shape[0],
        buffer=buffer.dtype if buffer is not None else "",
        mark=_mark(opened.state),
        dtype=main_dtype(first.values()),
        ranks=opened.tp,
        prefix=opened.prefix,
        head_cut=_head_cut(opened, embedding[0] * opened.tp),
    )


_MLP = {"linear": ("linear1", "linear2"), "dense": ("dense_h_to_4h", "dense_4h_to_h"), "w": ("w1", "w2")}


def _matrix(tensors: Mapping[str, Lazy], name: str, folder: Path) -> tuple[int, int]:
    tensor = tensors.get(name)
    if tensor is None:
        raise LayoutError(f"{name} is missing", file=folder)
    if len(tensor.shape) != 2:
        raise LayoutError(f"{name} has {len(tensor.shape)} dimensions, not 2", file=folder)
    return tensor.shape[0], tensor.shape[1]


def _mark(state: Mapping[str, Any]) -> str:
    own = state.get(MARK)
    release = own.get("release") if isinstance(own, dict) else None
    return release if isinstance(release, str) and release in RELEASES else ""


def _head_cut(opened: Stored, vocab: int) -> str:
    """The axis along which ranks share the output layer: the vocabulary, or (before 2.0, by default) the width."""
    for name, tensor in opened.shards[Rank()].items():
        if name.endswith(".final_linear.weight") and opened.tp > 1 and tensor.shape[:1] == (vocab,):
            return "h"
    return "v"

"""OLMo's own sharded layouts, each as one table of whole tensors that are assembled from the ranks' pieces.

    table = read_flat_params(Path("step1000"))       # local: model/rankN.pt, flat parameters of FSDP
    table = read_sharded_tensors(Path("step1000"))   # torch_legacy: rankN.pt, ShardedTensor records
    table = read_flat_files(Path("step1000/model"))  # olmo_core: metadata.json, rank_N.safetensors

Classes of torch are never made: their records are known by the last part of their name and by their fields.
Sources: allenai/OLMo `olmo/checkpoint.py` (LocalShardedCheckpointer, TorchLegacyShardedCheckpointer); OLMo-core 0.1
`olmo_core/distributed/checkpoint.py`; torch `distributed/fsdp/_flat_param.py`, `distributed/_shard/`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from surgery.containers import TensorTable, open_file
from surgery.containers.pickles.records import Obj, TensorRecord
from surgery.containers.text import read_json, read_yaml
from surgery.errors import FileError, show
from surgery.formats.flat import reshaped
from surgery.tensors.chunked import Chunk, Chunked
from surgery.tensors.files import plain_name
from surgery.tensors.lazy import Lazy, Same, Shape, Slice

Run = tuple[int, int, Lazy]  # elements [start, stop) of a flattened tensor, as a tensor of one dimension
_OLD_SPECS = "flattened_offsets_per_file"


def assemble(name: str, shape: Shape, runs: Sequence[Run], file: str) -> Lazy:
    """A tensor from runs of its flattened elements.  Raises FileError unless they cover it exactly once."""
    by_place: dict[tuple[int, int], list[Lazy]] = {}
    for start, stop, data in runs:
        if start < stop:
            by_place.setdefault((start, stop), []).append(data)
    dtypes = {data.dtype for _, _, data in runs}
    if len(dtypes) > 1:
        raise FileError(f"the pieces of {show(name)} have several dtypes: {', '.join(sorted(dtypes))}", file=file)
    chunks = []
    for (start, stop), copies in by_place.items():
        data = copies[0] if len(copies) == 1 else Same(copies, name)
        if data.shape != (stop - start,):
            what = f"a piece of {show(name)} has shape {list(data.shape)[:8]}, expected {stop - start} elements"
            raise FileError(what, file=file)
        chunks.append(Chunk((start,), (stop - start,), partial(_itself, data)))
    size = math.prod(shape)
    flat = Chunked(name, (size,), dtypes.pop() if dtypes else "float32", chunks, file)
    return reshaped(flat, shape)


def _itself(data: Lazy) -> Lazy:
    return data


def rank_files(folder: Path, stem: str, suffix: str) -> list[Path]:
    """The files of all ranks in their order, without a gap."""
    found = {
        int(m[1]): p for p in folder.iterdir() if (m := re.fullmatch(rf"{stem}(\d{{1,7}}){re.escape(suffix)}", p.name))
    }
    gap = next((i for i in range(len(found)) if i not in found), None)
    if gap is not None:
        raise FileError(f"{stem}{gap}{suffix} is missing", file=folder, hint="copy the files of every rank")
    return [found[i] for i in range(len(found))]


def _table(tensors: Mapping[str, Lazy], containers: Sequence[Any]) -> TensorTable:
    return TensorTable(tensors, tuple(containers))


# ----------------------------------------------------------------------------- local: flat parameters of FSDP


def read_flat_params(folder: Path) -> TensorTable:
    """`model/rankN.pt`: per FSDP module a flat parameter, and which elements of which tensors are in it."""
    files = rank_files(folder / "model", "rank", ".pt")
    _check_world(folder, len(files))
    runs: dict[str, list[Run]] = {}
    shapes: dict[str, Shape] = {}
    containers = [open_file(path) for path in files]
    for path, container in zip(files, containers, strict=True):
        for name, shape, run in _flat_runs(getattr(container, "root", None), str(path)):
            if shapes.setdefault(name, shape) != shape:
                raise FileError(f"{show(name)} has another shape than on rank 0", file=path)
            runs.setdefault(name, []).append(run)
    tensors = {name: assemble(name, shapes[name], pieces, str(folder / "model")) for name, pieces in runs.items()}
    return _table(tensors, containers)


def flat_pieces(path: Path) -> Iterator[tuple[str, Shape, int, int]]:
    """(tensor, its shape, first and last + 1 of its elements) of every piece in the flat parameters of a rank."""
    for name, shape, (start, stop, _) in _flat_runs(getattr(open_file(path), "root", None), str(path)):
        yield name, shape, start, stop


def _check_world(folder: Path, ranks: int) -> None:
    path = folder / "metadata.yaml"
    said = read_yaml(path, "metadata.yaml") if path.is_file() else None
    world = said.get("world_size") if isinstance(said, dict) else None
    if world is not None and world != ranks:
        hint = "copy the files of every rank"
        raise FileError(f"says world_size {show(world)}, but model/ holds {ranks} ranks", file=path, hint=hint)


def _flat_runs(root: object, file: str) -> Iterator[tuple[str, Shape, Run]]:
    modules = root.get("modules") if isinstance(root, dict) else None
    if not isinstance(modules, list):
        raise FileError("has no list `modules` of flat parameters", file=file)
    for module in modules:
        prefix = module.get("name") if isinstance(module, dict) else None
        handles = module.get("handles") if isinstance(module, dict) else None
        if not isinstance(prefix, str) or not isinstance(handles, list):
            raise FileError("a module of flat parameters is malformed", file=file)
        for handle in handles:
            for name, shape, run in _handle_runs(handle, file):
                yield (f"{prefix}.{name}" if prefix else name), shape, run


def _handle_runs(handle: object, file: str) -> Iterator[tuple[str, Shape, Run]]:
    """The pieces in one flat parameter, as torch 2.1 and later or as torch up to 2.0 describes them."""
    fields = {str(k).removeprefix("flat_param."): v for k, v in handle.items()} if isinstance(handle, dict) else {}
    data, names, shapes = fields.get("data"), fields.get("_fqns"), fields.get("_shapes")
    if not isinstance(data, TensorRecord) or len(data.shape) != 1 or not _same_length(names, shapes):
        raise FileError("a flat parameter is malformed", file=file)
    assert isinstance(names, (list, tuple)) and isinstance(shapes, (list, tuple))
    if fields.get("_shard_indices") is not None:
        pieces = list(_old_infos(fields, file))
    else:
        pieces = list(_new_infos(fields, len(names), file))
    for i, at, start, stop in pieces:
        name, shape = names[i], shapes[i]
        if type(name) is not str or not _numbers(shape) or not 0 <= at <= at + stop - start <= data.shape[0]:
            raise FileError(f"the place of {show(name)} in a flat parameter makes no sense", file=file)
        yield name, tuple(shape), (start, stop, Slice(data, 0, at, at + stop - start))


def _new_infos(fields: Mapping[str, Any], count: int, file: str) -> Iterator[tuple[int, int, int, int]]:
    """(parameter, place in the flat parameter, first and last + 1 element of the tensor) from _ShardParamInfo."""
    infos = fields.get("_shard_param_infos")
    if not _same_length(infos, range(count)):
        raise FileError("a flat parameter does not say which tensors it holds", file=file)
    assert infos is not None
    for i, info in enumerate(infos):
        values = info.args if isinstance(info, Obj) else info
        if not isinstance(values, (list, tuple)) or len(values) != 5 or type(values[0]) is not bool:
            raise FileError("a record of a flat parameter's piece is malformed", file=file)
        if values[0]:
            if not _numbers(values[1:]) or values[2] != values[4] - values[3] + 1:
                raise FileError("a record of a flat parameter's piece makes no sense", file=file)
            yield i, values[1], values[3], values[4] + 1  # the last element is inclusive


def _old_infos(fields: Mapping[str, Any], file: str) -> Iterator[tuple[int, int, int, int]]:
    """The same from torch up to 2.0: the first parameter of the shard, and inclusive ranges for all from there."""
    indices, offsets = fields["_shard_indices"], fields.get("_shard_param_offsets")
    if not _numbers(indices) or not indices or not isinstance(offsets, (list, tuple)):
        raise FileError("a flat parameter does not say which tensors it holds", file=file)
    at = 0
    for i, span in enumerate(offsets, indices[0]):
        if not _numbers(span) or len(span) != 2 or i >= len(fields["_fqns"]) or span[1] < span[0]:
            raise FileError("a record of a flat parameter's piece makes no sense", file=file)
        yield i, at, span[0], span[1] + 1
        at += span[1] + 1 - span[0]


def _same_length(a: object, b: object) -> bool:
    return isinstance(a, (list, tuple)) and isinstance(b, (list, tuple, range)) and len(a) == len(b)


def _numbers(values: object) -> bool:
    return isinstance(values, (list, tuple)) and all(type(n) is int and 0 <= n < 1 << 63 for n in values)


# ----------------------------------------------------------------------------------- torch_legacy: ShardedTensor


def read_sharded_tensors(folder: Path) -> TensorTable:
    """`rankN.pt`: every rank's state dicts, in which tensors are ShardedTensor records (or plain, where small)."""
    files = rank_files(folder, "rank", ".pt")
    containers = [open_file(path) for path in files]
    found: dict[str, list[tuple[str, Any]]] = {}
    for path, container in zip(files, containers, strict=True):
        root = getattr(container, "root", None)
        model = root.get("model") if isinstance(root, dict) else None
        if not isinstance(model, dict):
            raise FileError("has no state dict `model`", file=path)
        for name, value in model.items():
            found.setdefault(str(name), []).append((str(path), value))
    return _table({name: _joined(name, values) for name, values in found.items()}, containers)


def _joined(name: str, values: Sequence[tuple[str, Any]]) -> Lazy:
    if all(isinstance(value, TensorRecord) for _, value in values):
        return Same([value for _, value in values], name) if len(values) > 1 else values[0][1]
    shape, dtypes, chunks = None, set(), []
    for file, value in values:
        size, shards = _sharded_tensor(name, value, file)
        if shape not in (None, size):
            raise FileError(f"{show(name)} has another shape than on rank 0", file=file)
        shape = size
        for start, tensor in shards:
            dtypes.add(tensor.dtype)
            chunks.append(Chunk(start, tensor.shape, partial(_itself, tensor)))
    if len(dtypes) != 1 or shape is None:
        raise FileError(f"the pieces of {show(name)} have {len(dtypes)} dtypes", file=values[0][0])
    return Chunked(name, shape, dtypes.pop(), chunks, values[0][0])


def _sharded_tensor(name: str, value: object, file: str) -> tuple[Shape, list[tuple[Shape, Lazy]]]:
    """(global shape, [(offset, tensor)]) of a ShardedTensor record."""
    state = None
    if isinstance(value, Obj) and value.basename == "_rebuild_from_type_v2" and len(value.args) == 4:
        state = value.args[3]
    elif isinstance(value, Obj) and value.basename == "ShardedTensor" and value.states:
        state = value.states[0]
    if (
        not isinstance(state, tuple)
        or len(state) < 2
        or not isinstance(state[0], list)
        or not isinstance(state[1], Obj)
    ):
        raise FileError(f"{show(name)} is neither a tensor nor a ShardedTensor", file=file)
    size = state[1].state.get("size")
    if not isinstance(size, tuple) or not _numbers(size):
        raise FileError(f"{show(name)} has no size", file=file)
    shards: list[tuple[Shape, Lazy]] = []
    for shard in state[0]:
        fields = shard.state if isinstance(shard, Obj) else {}
        place = fields["metadata"].state if isinstance(fields.get("metadata"), Obj) else {}
        tensor, start = fields.get("tensor"), place.get("shard_offsets")
        if not isinstance(tensor, TensorRecord) or not isinstance(start, (list, tuple)) or not _numbers(start):
            raise FileError(f"a shard of {show(name)} is malformed", file=file)
        if list(tensor.shape) != list(place.get("shard_sizes") or ()):
            raise FileError(f"a shard of {show(name)} has another shape than its record says", file=file)
        shards.append((tuple(start), tensor))
    return size, shards


# -------------------------------------------------------------------------- olmo_core 0.1: flat safetensors files


def read_flat_files(folder: Path) -> TensorTable:
    """`metadata.json` and `rank_N.safetensors`: flattened pieces, and where they lie in the flattened tensors."""
    path = folder / "metadata.json"
    metadata = read_json(path, "metadata.json")
    listed = metadata.get("tensors") if isinstance(metadata, dict) else None
    if not isinstance(listed, dict):
        raise FileError("has no `tensors`", file=path)
    opened: dict[str, Any] = {}
    tensors = {}
    for name, entry in listed.items():
        shape, specs = _entry(name, entry, path)
        runs: list[Run] = []
        for file, spec in specs.items():
            plain = plain_name(file, f"the entry of {show(name)}", path)
            if plain not in opened:
                opened[plain] = open_file(folder / plain)
            runs += _file_runs(name, shape, spec, opened[plain], path)
        tensors[name] = assemble(name, shape, runs, str(path))
    return _table(tensors, list(opened.values()))


def _entry(name: str, entry: object, path: Path) -> tuple[Shape, Mapping[str, Any]]:
    fields = entry if isinstance(entry, dict) else {}
    shape, specs = fields.get("shape"), fields.get("shard_spec_per_file")
    if specs is None and isinstance(fields.get(_OLD_SPECS), dict):
        specs = {file: {"flattened_offsets": _nested(spans)} for file, spans in fields[_OLD_SPECS].items()}
    if not _numbers(shape) or not isinstance(specs, dict):
        raise FileError(f"the entry of {show(name)} is malformed", file=path)
    assert isinstance(shape, list)
    return tuple(shape), specs


def _nested(spans: Any) -> Any:
    """[start, stop] -> [[start, stop]]: how early files wrote a single span."""
    return [spans] if isinstance(spans, list) and spans and type(spans[0]) is int else spans


def _file_runs(name: str, shape: Shape, spec: object, container: Any, path: Path) -> Iterator[Run]:
    """The spans of one file's piece, which lie one after the other in it."""
    data, at = container.tensors.get(name), 0
    for start, stop in _spans(name, shape, spec, path):
        if start == stop:
            continue
        if data is None or len(data.shape) != 1 or at + stop - start > data.shape[0]:
            raise FileError(f"does not hold elements {start} to {stop} of {show(name)}", file=container.file.path)
        yield start, stop, Slice(data, 0, at, at + stop - start)
        at += stop - start
    if data is not None and at != math.prod(data.shape):
        raise FileError(f"{show(name)} has elements that metadata.json does not place", file=container.file.path)


def _spans(name: str, shape: Shape, spec: object, path: Path) -> Iterator[tuple[int, int]]:
    fields = spec if isinstance(spec, dict) else {}
    spans, sizes, start = fields.get("flattened_offsets"), fields.get("local_shape"), fields.get("global_offset")
    if spans is not None:
        if not isinstance(spans, list) or any(not _numbers(s) or len(s) != 2 or s[0] > s[1] for s in spans):
            raise FileError(f"the offsets of {show(name)} are malformed", file=path)
        yield from ((a, b) for a, b in spans)
    elif _numbers(sizes) and _numbers(start) and len(sizes) == len(start) == len(shape) in (1, 2):  # type: ignore[arg-type]
        if len(shape) == 1:
            yield start[0], start[0] + sizes[0]  # type: ignore[index]
            return
        for row in range(start[0], start[0] + sizes[0]):  # type: ignore[index]
            at = row * shape[1] + start[1]  # type: ignore[index]
            yield at, at + sizes[1]  # type: ignore[index]
    else:
        raise FileError(f"the offsets of {show(name)} are malformed", file=path)

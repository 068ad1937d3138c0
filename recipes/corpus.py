"""A small text mixture for demos, made of packages that surgery needs anyway: code, mathematics and prose.

    python recipes/corpus.py .cache/corpus         # code.jsonl, math.jsonl, prose.jsonl and a tokenizer of 2048 tokens

Each domain comes from named packages that are the same files on every machine: the text depends on their versions, and
on nothing else that is installed.  What is printed names them, and a digest of each text; with the versions that
constraints.txt pins it is the text of all tables in the docs.  Sources are parsed, not imported; nothing is shipped.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import warnings
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

VOCABULARY = 2048
LONGEST = 20_000  # characters of a document
SHORTEST = 200
MOST = 2_000_000  # characters of a domain
DOMAINS = {  # pure Python, which surgery, torch and transformers need; read in this order until there is enough
    "code": ("click", "jinja2", "fsspec", "pydantic"),
    "math": ("mpmath", "sympy"),
    "prose": ("networkx", "transformers"),
}


def package_files(name: str) -> list[Path]:
    """The Python files of an installed package, in a fixed order; [] if it is not installed."""
    spec = find_spec(name)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return sorted(p for folder in folders for p in Path(folder).rglob("*.py") if "tests" not in p.parts)


def parsed(path: Path) -> ast.Module | None:
    """The syntax tree of a file; None if it is no Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            return ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return None


def docstrings(files: Iterable[Path]) -> Iterator[str]:
    """The docstrings of all modules, classes and functions."""
    for path in files:
        tree = parsed(path)
        for node in ast.walk(tree) if tree else ():
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield ast.get_docstring(node) or ""


def texts_of(domain: str) -> Iterator[str]:
    """The files of a domain's packages if it is code, else their docstrings."""
    for files in map(package_files, DOMAINS[domain]):
        yield from (path.read_text(encoding="utf-8") for path in files) if domain == "code" else docstrings(files)


def documents(texts: Iterable[str]) -> Iterator[str]:
    """Each text once, long ones cut at line ends, until there is enough."""
    seen, total = set(), 0
    for text in texts:
        while len(text) >= SHORTEST:
            if total > MOST:
                return
            cut = len(text) if len(text) <= LONGEST else text.rfind("\n", SHORTEST, LONGEST) + 1 or LONGEST
            piece, text = text[:cut].strip(), text[cut:]
            if len(piece) >= SHORTEST and piece not in seen:
                seen.add(piece)
                total += len(piece)
                yield piece


def train_tokenizer(folder: Path, texts: Iterable[str]) -> None:
    """A byte-level BPE tokenizer of VOCABULARY tokens, as transformers reads it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "model_max_length": 1024}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sample: list[str] = []
    for domain, packages in DOMAINS.items():
        made = list(documents(texts_of(domain)))
        text = "".join(json.dumps({"text": text}) + "\n" for text in made)
        (folder / f"{domain}.jsonl").write_text(text, encoding="utf-8")
        sample += made[:: max(1, len(made) // 400)]
        digest, names = hashlib.sha256(text.encode()).hexdigest()[:12], [f"{name} {version(name)}" for name in packages]
        print(
            f"{domain:6} {len(made):6,} documents, {sum(map(len, made)) / 1e6:.1f} MB, {digest} of {', '.join(names)}"
        )
    train_tokenizer(folder / "tokenizer", sample)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".cache/corpus"))

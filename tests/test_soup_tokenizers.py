"""Merges of models with different tokenizers: every token's row against mergekit, whatever its id."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import surgery
from surgery.errors import ConfigError
from surgery.merging.vocabulary import Rows
from tests import merges, oracle
from tests.test_conversion import weights
from tests.test_soup_engine import Given

COMMON = [f"w{i}" for i in range(40)]
WORDS = {"a": [*COMMON, "x", "y"], "b": [*COMMON[20:], *COMMON[:20], "y", "z", "only-b"], "c": ["z", *COMMON, "x"]}
SPECIAL = {"a": ["<s>", "</s>"], "b": ["<s>", "<tool>"], "c": ["<s>", "</s>", "<think>"]}
TEMPLATE = {"a": "{{ 'A' }}", "b": "{{ 'B' }}", "c": "{{ 'B' }}"}


def tokenizer(name: str, folder: Path) -> int:
    """A word-level tokenizer with special tokens behind the words; returns how many tokens it has."""
    words = WORDS[name]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL[name]])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token=SPECIAL[name][1])
    wrapped.chat_template = TEMPLATE[name]
    wrapped.save_pretrained(folder)
    return len(wrapped)


@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    """Three models with a tokenizer each; the third has padding rows behind its tokens."""
    folder, made = tmp_path_factory.mktemp("vocabularies"), []
    for i, name in enumerate("abc"):
        count = tokenizer(name, folder / name)
        ids = {"bos_token_id": len(WORDS[name]), "eos_token_id": len(WORDS[name]) + 1}
        merges.tiny.save("llama", folder / name, **{**merges.SMALL, "l": 1, "v": count + 7 * (name == "c"), **ids})
        merges.disturb(folder / name, 10 + i, 1.0)
        made.append(str(folder / name))
    return made


LINEAR = """
    merge_method: linear
    models:
      - {model: <A>, parameters: {weight: 0.5}}
      - {model: <B>, parameters: {weight: 0.3}}
      - {model: <C>, parameters: {weight: 0.2}}
    """
TASK = """
    merge_method: task_arithmetic
    base_model: <A>
    models: [{model: <B>, parameters: {weight: 0.5}}, {model: <C>, parameters: {weight: 0.3}}]
    """
YAMLS = {
    "union of three": LINEAR + "tokenizer_source: union",
    "union with a base": TASK + "tokenizer: {source: union}",
    "that of the base": TASK + "tokenizer_source: base",
    "the first model's": LINEAR + "tokenizer_source: base",
    "that of a model": LINEAR + "tokenizer: {source: <C>}",
    "padded": LINEAR + "tokenizer: {source: union, pad_to_multiple_of: 32}",
    "rules": LINEAR
    + """
    tokenizer:
      source: union
      tokens:
        x: {source: <C>}
        y: {source: {kind: model_token, model: <A>, token_id: 3}}
        z: {source: {kind: model_token, model: <B>, token: w7}, force: true}
        w5: {source: {kind: zero}, force: true}
        <new>: {source: {kind: model_token, model: <A>, token: w9}}
        w6: {source: <B>, force: true}
    """,
    "rules and a base": TASK
    + """
    tokenizer:
      source: base
      pad_to_multiple_of: 16
      tokens:
        x: {source: <C>, force: true}
        w39: {source: {kind: zero}}
    """,
}


def config_of(text, folders):
    for name, folder in zip("ABC", folders, strict=True):
        text = text.replace(f"<{name}>", folder)
    lines = text.splitlines()
    return yaml.safe_load("\n".join(line.removeprefix("    ") for line in lines))


@pytest.mark.parametrize("arithmetic", ["fp32", "mergekit"])
@pytest.mark.parametrize("name", YAMLS)
def test_every_token_has_mergekits_row(name, arithmetic, trio, tmp_path):
    config = config_of(YAMLS[name], trio)
    surgery.soup(config, tmp_path / "ours", arithmetic=arithmetic)
    merges.mergekit(config, tmp_path / "theirs")
    ours, theirs = (AutoTokenizer.from_pretrained(tmp_path / n) for n in ("ours", "theirs"))
    assert ours.get_vocab().keys() == theirs.get_vocab().keys()
    mine, other = weights(tmp_path / "ours"), weights(tmp_path / "theirs")
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        assert mine[key].shape == other[key].shape
        for token, place in ours.get_vocab().items():
            assert torch.equal(mine[key][place], other[key][theirs.get_vocab()[token]]), (key, token)
        count = len(ours.get_vocab())
        assert torch.allclose(mine[key][count:], other[key][count:], atol=1e-6)  # padding: means, in another order
    rest = mine.keys() - {"model.embed_tokens.weight", "lm_head.weight"}
    assert all(oracle.same_bits(mine[k], other[k]) for k in rest)
    settings = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert settings["vocab_size"] == len(mine["lm_head.weight"])
    assert settings["bos_token_id"] == ours.get_vocab()["<s>"]
    assert ours("w3 x <s> w8", add_special_tokens=False).tokens() == theirs(
        "w3 x <s> w8", add_special_tokens=False
    ).tokens() or name in ("that of the base", "the first model's")


def test_a_union_keeps_the_ids_of_the_base(trio, tmp_path):
    surgery.soup(config_of(TASK + "tokenizer_source: union", trio), tmp_path / "out")
    ours, base = (AutoTokenizer.from_pretrained(f) for f in (tmp_path / "out", trio[0]))
    assert base.get_vocab().items() <= ours.get_vocab().items()
    fresh = sorted((i, t) for t, i in ours.get_vocab().items() if t not in base.get_vocab())
    assert [t for _, t in fresh] == ["z", "only-b", "<tool>", "<think>"]
    assert ours.added_tokens_decoder[fresh[2][0]].special


MINE = "{{ 'mine, and longer' }}"


@pytest.mark.parametrize(("given", "starts"), [("auto", "{{ 'B' }}"), ("chatml", "{%"), (MINE, MINE)])
def test_chat_templates(given, starts, trio, tmp_path):
    config = config_of(LINEAR + "tokenizer_source: base", trio) | {"chat_template": given}
    surgery.soup(config, tmp_path / "ours")
    merges.mergekit(config, tmp_path / "theirs")
    ours, theirs = (AutoTokenizer.from_pretrained(tmp_path / n) for n in ("ours", "theirs"))
    assert ours.chat_template == theirs.chat_template
    assert ours.chat_template.startswith(starts)


def test_without_a_tokenizer_section_the_donors_goes_along(trio, tmp_path):
    other = shutil.copytree(trio[0], tmp_path / "other")
    surgery.soup({"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 1}}
                                                       for m in (trio[0], str(other))]}, tmp_path / "out")  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (Path(trio[0]) / name).read_bytes()


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("tokenizer: {tokens: {x: {source: <A>, force: true}, only-b: {source: <A>}}}", "has no 'only-b'"),
        ("tokenizer: {tokens: {x: {source: {kind: model_token, model: <B>, token_id: 900}}}}", "has no row 900"),
        ("tokenizer: {tokens: {x: {source: {kind: model_token, model: <B>, token: nope}}}}", "has no 'nope'"),
        ("tokenizer: {tokens: {x: {source: {kind: model_token, model: <B>}}}}", "token_id and token"),
        ("tokenizer: {tokens: {x: {source: other/model}}}", "which is not merged"),
        ("tokenizer: {source: union, pad_to_multiple_of: 0}", "not a positive number"),
        ("tokenizer_source: base\n    chat_template: chatlm", "known: auto"),
    ],
)
def test_mistakes_are_named(lines, said, trio, tmp_path):
    with pytest.raises(ConfigError, match=said):
        surgery.soup(config_of(LINEAR + lines, trio), tmp_path / "out")


def test_models_of_other_formats_bring_their_tokenizers(trio, tmp_path):
    """From Meta's format, and into it."""
    surgery.convert(trio[1], tmp_path / "meta", to="meta")
    plain = surgery.soup(config_of(YAMLS["union of three"], trio), tmp_path / "plain")
    mixed = [trio[0], str(tmp_path / "meta"), trio[2]]
    made = surgery.soup(config_of(YAMLS["union of three"], mixed), tmp_path / "out", to="meta")
    assert made.content_digest == plain.content_digest
    rows = len(weights(tmp_path / "plain")["lm_head.weight"])
    back = surgery.convert(tmp_path / "out", tmp_path / "hf", to="hf", vocab_size=rows)
    assert back.content_digest == plain.content_digest
    name = "tokenizer.json"
    assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_tokens_can_be_added_to_that_of_the_base(trio, tmp_path):
    """mergekit 0.1.5 stops with a KeyError here."""
    rules = "tokenizer: {source: base, tokens: {only-b: {source: <B>}, <new>: {source: {kind: zero}}}}"
    surgery.soup(config_of(TASK + rules, trio), tmp_path / "out")
    found = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert len(found) == len(WORDS["a"]) + 2 + 2
    head = weights(tmp_path / "out")["lm_head.weight"]
    own = weights(Path(trio[1]))["lm_head.weight"][WORDS["b"].index("only-b")]
    assert torch.allclose(head[found["only-b"]], own)
    assert not head[found["<new>"]].any()


def test_rows_of_any_box():
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn((9, 6), generator=generator) for _ in range(2))
    origins = [((0, 3),), ((0, 4),), ((1, 0),), (), ((0, 1), (1, 8)), ((1, 1),)]
    rows = Rows([Given(a), Given(b)], origins, 3)
    want = torch.stack([a[3], a[4], b[0], torch.zeros(6), (a[1] + b[8]) / 2, b[1]])
    want = torch.cat([want, want.mean(0, keepdim=True).expand(3, 6)])
    assert torch.equal(rows.full(), want)
    for first in range(9):
        for last in range(first, 10):
            assert torch.equal(rows.read(((first, last), (2, 5))), want[first:last, 2:5])

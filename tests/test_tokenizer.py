"""Tokenizers keep their ids across formats: against ids that Meta's own Tokenizer classes gave, and two libraries."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Fast

from surgery import tokenizer as tok
from surgery.errors import FileError, SurgeryError, UsageError
from surgery.tokenizer import bpe
from surgery.tokenizer import sentencepiece as spm
from surgery.tokenizer import tiktoken as ranked

GOLDEN = Path(__file__).parent / "golden" / "tokenizers"
MODELS = ("llama2", "codellama", "llama3")
RANKS = GOLDEN / "llama3" / "tokenizer.model"


def expected(name: str) -> dict:
    return json.loads((GOLDEN / name / "tokenizer_expected.json").read_text("utf-8"))


def put(carried: tok.Carried, folder: Path) -> Path:
    """The files on disk: literal heads, and regions that are copies of files."""
    for file in carried.files:
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        regions = [bytes(r.tensor.read(((0, r.tensor.shape[0]),)).numpy()) for r in file.regions]
        data = file.head + b"".join(regions)
        assert len(data) == file.size
        path.write_bytes(data)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def auto(folder: Path):
    from transformers import AutoTokenizer

    (folder / "config.json").write_text('{"model_type": "llama"}')
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def hf_of(name: str, folder: Path, **options) -> Path:
    found = tok.find(GOLDEN / name)
    assert found is not None
    return put(tok.for_hf(found, vocab_size=found.vocab_size, max_length=77, **options), folder)


# --- the ids of Meta's programs ---


@pytest.mark.parametrize("name", MODELS)
def test_auto_tokenizer_gives_the_ids_of_metas_program(name: str, tmp_path: Path) -> None:
    want, got = expected(name), auto(hf_of(name, tmp_path))
    assert len(got) == want["meta"]["n_words"] and got.model_max_length == 77
    assert (got.bos_token_id, got.eos_token_id) == (want["meta"]["bos"], want["meta"]["eos"])
    assert len(want["encode"]) >= 7
    for case in want["encode"]:
        assert got.encode(case["text"]) == case["ids"], ascii(case["text"])
        assert got.decode(case["ids"], skip_special_tokens=True) == case["text"]


@pytest.mark.parametrize("name", MODELS)
def test_found_sizes_and_special_ids(name: str) -> None:
    found, meta = tok.find(GOLDEN / name), expected(name)["meta"]
    assert found is not None
    assert (found.kind, found.vocab_size) == (meta["kind"], meta["n_words"])
    assert found.ids() == {"bos_token_id": meta["bos"], "eos_token_id": meta["eos"]}
    assert f"{meta['kind']}, {meta['n_words']} tokens, bos {meta['bos']}, eos {meta['eos']}" in found.summary


def test_special_tokens_have_the_ids_of_metas_program(tmp_path: Path) -> None:
    got, specials = auto(hf_of("llama3", tmp_path)), expected("llama3")["meta"]["specials"]
    assert len(specials) == 256
    for text, index in specials.items():
        assert got.encode(text, add_special_tokens=False) == [index]
    begin, end = specials["<|start_header_id|>"], specials["<|eot_id|>"]
    ids = got.encode("<|start_header_id|>Hello world<|eot_id|>")
    hello = expected("llama3")["encode"][0]
    assert hello["text"] == "Hello world"
    assert ids == [hello["ids"][0], begin, *hello["ids"][1:], end]


def test_names_of_releases() -> None:
    """Ids from the tokenizer.json files of the releases on the hub, where 128000 ranks come first."""
    published = {
        "3": {"reserved_special_token_3": 5, "reserved_special_token_4": 8, "reserved_special_token_250": 255},
        "3.1": {"finetune_right_pad_id": 4, "eom_id": 8, "python_tag": 10, "reserved_special_token_247": 255},
    }
    for release, ids in published.items():
        names = ranked.NAMES[release]
        assert len(names) == len(set(names)) == 256
        assert {name: names.index(f"<|{name}|>") for name in ids} == ids
    for table in ranked.NAMES.values():  # what every release gives a meaning has one place
        assert [table.index(f"<|{n}|>") for n in ("begin_of_text", "end_of_text", "start_header_id", "eot_id")] == [
            0,
            1,
            6,
            9,
        ]


def test_release_is_named_in_the_notes(tmp_path: Path) -> None:
    found = tok.find(GOLDEN / "llama3")
    assert found is not None
    assert any("llama-models" in n for n in tok.for_hf(found, vocab_size=576, max_length=8).notes)
    notes = tok.for_hf(found, vocab_size=576, max_length=8, release="3").notes
    assert any("release 3" in n for n in notes) and any("chat template" in n for n in notes)
    assert len(tok.for_hf(found, vocab_size=570, max_length=8).notes) == len(notes) + 1  # tokens without a row
    with pytest.raises(UsageError, match="'2'"):
        tok.for_hf(found, vocab_size=576, max_length=8, release="2")
    assert auto(hf_of("llama3", tmp_path, release="3")).convert_tokens_to_ids("<|reserved_special_token_3|>") == 325


# --- the libraries, on any text ---

ODD = (" ", "  ", "\n", "\t", "\r\n", "\u2581", "'s", "'\u017f", "\u00e9", "e\u0301", "\U0001f642", "\u200d", "\x00")
ODD += ("\x85", "\u3000", "\ufeff", "\u6f22", "12345", "aaa", "<0x0A>", "the", "<X>", " <Y>", "<", "[", "\u2028")
TEXTS = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from(ODD), max_size=14).map("".join),
    st.text(alphabet=" abt", max_size=40),
).filter(lambda text: not any(token in text for token in ("<s>", "</s>", "<unk>")))
MANY = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))


@cache
def trained(**options) -> bytes:
    """A SentencePiece model with other settings than Llama's."""
    out = io.BytesIO()
    lines = [
        f"the quick brown fox jumps over {i} lazy dogs    with   spaces aaaaaa aaa <X> foo <Y> bar" for i in range(300)
    ]
    base = {"vocab_size": 330, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    base |= {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, minloglevel=2, **(base | options)
    )
    return out.getvalue()


KINDS = {
    "llama2": lambda: (GOLDEN / "llama2" / "tokenizer.model").read_bytes(),
    "codellama": lambda: (GOLDEN / "codellama" / "tokenizer.model").read_bytes(),
    "spaces squeezed": lambda: trained(remove_extra_whitespaces=True),
    "no space before": lambda: trained(add_dummy_prefix=False),
    "no bytes": lambda: trained(byte_fallback=False, vocab_size=90),
    "user symbols": lambda: trained(user_defined_symbols="<X>,\u2581<Y>,["),
}


@cache
def pair(kind: str) -> tuple[sentencepiece.SentencePieceProcessor, Fast, list[str]]:
    data = KINDS[kind]()
    document, notes = spm.tokenizer_json(spm.parse(data))
    assert document is not None
    return sentencepiece.SentencePieceProcessor(model_proto=data), Fast.from_str(document.decode()), notes


@pytest.mark.parametrize("kind", KINDS)
def test_sentencepiece_library_agrees_on_any_text(kind: str) -> None:
    library, fast, notes = pair(kind)
    assert len(notes) == (kind == "user symbols")

    @MANY
    @given(TEXTS)
    @example("")
    @example(" ")
    @example("a" + " " * 37 + "b")
    def check(text: str) -> None:
        if kind == "user symbols" and text.replace(" ", "\u2581") in ("<X>", "\u2581<Y>", "["):
            return  # named in the notes
        ids = library.encode(text)
        assert fast.encode(text).ids == [library.bos_id(), *ids]
        odd = kind == "spaces squeezed" and "\u2581" in text  # written spaces come back as more or fewer
        if library.unk_id() not in ids and not odd:  # for an unknown token the library writes a sign
            assert fast.decode(ids) == library.decode(ids)

    check()


def test_user_symbol_alone_is_the_case_that_the_notes_name() -> None:
    library, fast, notes = pair("user symbols")
    assert "gets no space" in notes[0]
    assert [library.bos_id(), *library.encode("<X>")] != fast.encode("<X>").ids
    assert [library.bos_id(), *library.encode("a<X>")] == fast.encode("a<X>").ids


def test_tiktoken_library_agrees_on_any_text() -> None:
    ranks = ranked.read(RANKS)
    library = tiktoken.Encoding("tiny", pat_str=ranked.PATTERN, mergeable_ranks=ranks, special_tokens={})
    fast = Fast.from_str(ranked.tokenizer_json(ranks, ranked.NAMES["3"]).decode())

    @MANY
    @given(TEXTS)
    def check(text: str) -> None:
        ids = library.encode(text)
        assert fast.encode(text).ids == [len(ranks), *ids]
        assert fast.decode(ids) == text

    check()


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"model_type": "unigram"}, "not BPE"), ({"treat_whitespace_as_suffix": True}, "spaces")],
    ids=["unigram", "space after"],
)
def test_other_kinds_are_carried_but_not_translated(options: dict, reason: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(trained(**options))
    files, notes = tok.for_hf(tok.find(tmp_path), vocab_size=330, max_length=8)
    assert [file.name for file in files] == ["tokenizer.model"] and len(notes) == 1 and reason in notes[0]


def test_merges_are_all_splits_in_the_order_of_the_pieces() -> None:
    assert bpe.merges({b"b": 0, b"a": 1, b"ab": 2, b"bb": 3, b"abb": 4, b"xy": 5}) == [
        (b"a", b"b"),
        (b"b", b"b"),
        (b"a", b"bb"),
        (b"ab", b"b"),
    ]


# --- there and back ---


@pytest.mark.parametrize("name", MODELS)
def test_meta_to_hf_to_meta_keeps_the_bytes(name: str, tmp_path: Path) -> None:
    back = put(tok.for_meta(tok.find(hf_of(name, tmp_path / "hf"))), tmp_path / "meta")
    assert (back / "tokenizer.model").read_bytes() == (GOLDEN / name / "tokenizer.model").read_bytes()


def hf_folder(kind: str, folder: Path) -> Path:
    """An HF tokenizer as transformers saves it, with everything that may lie beside one."""
    auto(hf_of("llama2" if kind == "sentencepiece" else "llama3", folder / "made")).save_pretrained(folder / kind)
    out = folder / kind
    if kind != "bare":
        native = "tokenizer.model" if kind == "sentencepiece" else "original/tokenizer.model"
        (out / native).parent.mkdir(exist_ok=True)
        shutil.copy(folder / "made" / native, out / native)
    (out / "chat_template.jinja").write_text("{{ messages }}")
    (out / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    (out / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    return out


@pytest.mark.parametrize("kind", ["sentencepiece", "ranks", "bare"])
def test_hf_to_meta_to_hf_keeps_every_byte(kind: str, tmp_path: Path) -> None:
    source = hf_folder(kind, tmp_path)
    before = contents(source)
    meta = put(tok.for_meta(tok.find(source)), tmp_path / "meta")
    (meta / "params.json").write_text("{}")
    original = GOLDEN / ("llama2" if kind == "sentencepiece" else "llama3") / "tokenizer.model"
    assert (meta / "tokenizer.model").read_bytes() == original.read_bytes()  # "bare": made from tokenizer.json
    found = tok.find(meta)
    assert found is not None and found.kind == "hf"
    assert found.native_kind == ("sentencepiece" if kind == "sentencepiece" else "tiktoken")
    after = contents(put(tok.for_hf(found, vocab_size=576, max_length=9), tmp_path / "back"))
    if kind == "bare":
        assert after.pop("original/tokenizer.model") == original.read_bytes()
    assert after == before


def test_any_format_carries_the_files_as_they_are(tmp_path: Path) -> None:
    source = hf_folder("ranks", tmp_path)
    once = put(tok.carry(tok.find(source)), tmp_path / "neox")
    assert contents(once) == contents(source)
    assert contents(put(tok.carry(tok.find(once)), tmp_path / "megatron")) == contents(source)


def test_ranks_come_back_only_if_they_give_the_same_ids() -> None:
    ranks = ranked.read(RANKS)
    data = ranked.tokenizer_json(ranks, ranked.NAMES["3.1"])
    assert ranked.ranks_of(json.loads(data)) == (ranks, "")
    assert ranked.write(ranks) == RANKS.read_bytes()

    def changed(change) -> str:
        document = json.loads(data)
        change(document, document["model"])
        found, reason = ranked.ranks_of(document)
        assert found is None
        return reason

    def swap_ids(d, m):
        m["vocab"].update({"Ġthe": m["vocab"]["in"], "in": m["vocab"]["Ġthe"]} if "Ġthe" in m["vocab"] else {})
        a, b = list(m["vocab"])[-2:]
        m["vocab"][a], m["vocab"][b] = m["vocab"][b], m["vocab"][a]

    assert "merges" in changed(swap_ids)
    assert "merges" in changed(lambda d, m: m["merges"].pop())
    assert "merges" in changed(lambda d, m: m["merges"].reverse())
    assert "settings" in changed(lambda d, m: m.update(ignore_merges=False))
    assert "pattern" in changed(lambda d, m: d["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\s+"))
    assert "pattern" in changed(lambda d, m: d.update(normalizer={"type": "NFC"}))
    assert "0, 1, 2" in changed(lambda d, m: m["vocab"].update(b=1000))
    assert "bytes" in changed(lambda d, m: m["vocab"].update({" ": len(m["vocab"])}))
    assert "single bytes" in changed(
        lambda d, m: m["vocab"].update({"aaaaa": m["vocab"].pop("a")})  # a token of that rank, but not the byte
    )
    assert "BPE" in changed(lambda d, m: m.update(type="Unigram"))


def test_meta_is_told_about_tokens_that_it_will_not_know(tmp_path: Path) -> None:
    source = hf_folder("sentencepiece", tmp_path)
    got = auto(source)
    got.add_tokens(["<new>"])
    got.save_pretrained(source)
    assert any("'<new>'" in note for note in tok.for_meta(tok.find(source)).notes)

    bare = hf_folder("bare", tmp_path)
    assert len(tok.for_meta(tok.find(bare), vocab_size=576).notes) == 1
    assert any("577 rows" in note for note in tok.for_meta(tok.find(bare), vocab_size=577).notes)
    got = auto(bare)
    got.add_tokens(["<new>"])
    got.save_pretrained(bare)
    assert any("'<new>'" in note for note in tok.for_meta(tok.find(bare), vocab_size=576).notes)


# --- where tokenizers are found ---


def test_metas_older_releases_keep_it_one_folder_up(tmp_path: Path) -> None:
    model = tmp_path / "7B"
    model.mkdir()
    shutil.copy(GOLDEN / "llama2" / "tokenizer.model", tmp_path)
    assert tok.find(model) is None
    (model / "params.json").write_text("{}")
    assert tok.find(model).vocab_size == 500


def test_neox_file_beside_the_configs_becomes_an_hf_tokenizer(tmp_path: Path) -> None:
    place = GOLDEN / "neox"
    for found in (tok.find(tmp_path, place), tok.find(tmp_path, place / "20B_tokenizer.json")):
        assert found is not None and (found.kind, found.vocab_size) == ("hf", 500)
    carried = tok.for_hf(found, vocab_size=512, max_length=64, ids={"bos": 0, "eos": 0, "pad": 1, "unk": 7777})
    got = auto(put(carried, tmp_path))
    assert (got.bos_token, got.eos_token, got.pad_token) == ("<|endoftext|>", "<|endoftext|>", "<|padding|>")
    direct = Fast.from_file(str(place / "20B_tokenizer.json"))
    for case in expected("llama2")["encode"]:
        assert got.encode(case["text"]) == direct.encode(case["text"]).ids
    assert any("without tokenizer_config.json" in note for note in carried.notes)
    assert any("find no tokenizer.model" in note for note in tok.for_meta(found).notes)


def test_none_is_found_where_there_is_none(tmp_path: Path) -> None:
    assert tok.find(tmp_path) is None and tok.find(tmp_path / "missing", tmp_path) is None
    (tmp_path / "tokenizer.json").mkdir()
    os.mkfifo(tmp_path / "tokenizer.model")
    assert tok.find(tmp_path) is None


def test_custom_code_is_named_and_not_run(tmp_path: Path) -> None:
    hf_of("llama2", tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "auto_map": {"AutoTokenizer": ["x.Y", None]}}))
    assert any("auto_map" in note for note in tok.for_hf(tok.find(tmp_path), vocab_size=500, max_length=9).notes)


# --- broken and hostile files ---


def field(number: int, data: bytes) -> bytes:
    assert len(data) < 128
    return bytes([number << 3 | 2, len(data)]) + data


def piece(text: bytes, score: float = 0.0, kind: int = 1) -> bytes:
    return field(1, field(1, text) + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind]))


UNK = piece(b"<unk>", 0.0, 2)
LINES = RANKS.read_bytes().splitlines(keepends=True)
BROKEN = {
    "cut": ((GOLDEN / "llama2" / "tokenizer.model").read_bytes()[:-3], "outside"),
    "endless number": (b"\x0a" + b"\xff" * 20, "10 bytes"),
    "giant field": (b"\x0a\xff\xff\xff\xff\x7f", "outside"),
    "group": (UNK + b"\x0b", "wire type 3"),
    "message as number": (UNK + b"\x10\x01", "no message"),
    "number as text": (UNK + field(1, b"\x08\x01"), "another type"),
    "equal pieces": (UNK + piece(b"a") + piece(b"a"), "equal"),
    "empty piece": (UNK + piece(b""), "empty"),
    "no unknown": (piece(b"a"), "unknown piece"),
    "nan": (UNK + piece(b"a", float("nan")), "finite"),
    "type": (UNK + piece(b"a", 0.0, 9), "type"),
    "bytes": (UNK + piece(b"<0x0A>", 0.0, 6) + field(2, b"\x98\x02\x01"), "byte fallback"),
    "utf-8": (UNK + piece(b"\xff"), "utf-8"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "neither"),
    "empty": (b"", "neither"),
    "zeros": (bytes(99), "neither"),
    "gap": (b"".join(LINES[:-2] + LINES[-1:]), "gaps"),
    "repeat": (b"".join(LINES + LINES[-1:]), "twice"),
    "same rank": (b"".join(LINES) + b"enp6eno= 319\n", "gaps"),
    "missing byte": (b"".join(b"%s %d\n" % (line.split()[0], i) for i, line in enumerate(LINES[1:])), "single bytes"),
    "base64": (b"".join(LINES) + b"abc 320\n", "base64"),
    "words": (b"".join(LINES) + b"hello\n", "base64 rank"),
    "giant rank": (b"".join(LINES) + b"enp6eno= 123456789\n", "base64 rank"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_native_files_end_in_a_file_error(case: str, tmp_path: Path) -> None:
    data, words = BROKEN[case]
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(FileError, match=words) as error:
        tok.find(tmp_path)
    assert str(error.value).isascii() and "tokenizer.model" in str(error.value)
    assert case != "pointer" or "git lfs pull" in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 200_000,
        "[1]",
        '{"a": ' + "9" * 5000 + "}",
        "\ud800",
        "version https://git-lfs.github.com/spec/v1",
    ],
    ids=["empty", "cut", "deep", "list", "digits", "surrogate", "pointer"],
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_broken_json_ends_in_a_file_error(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(FileError) as error:
        tok.find(tmp_path)
    assert str(error.value).isascii()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_giant_files_are_refused_before_they_are_read(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x0a" if name.endswith("model") else b"{")
    os.truncate(tmp_path / name, 1 << 40)
    with pytest.raises(FileError, match="limit"):
        tok.find(tmp_path)


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(path=st.lists(st.integers(0, 20), max_size=5), value=ANY, config=ANY)
def test_odd_json_is_carried_or_refused(path: list[int], value: object, config: object, tmp_path: Path) -> None:
    document = json.loads(ranked.tokenizer_json({bytes([i]): i for i in range(256)}, ranked.NAMES["3"][:3]))
    at = document
    for step in path:
        keys = list(at) if isinstance(at, dict) else list(range(len(at))) if isinstance(at, list) else []
        if not keys:
            break
        parent, key = at, keys[step % len(keys)]
        at = parent[key]
    if path and document:
        parent[key] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    settings_file = tmp_path / "tokenizer_config.json"
    settings_file.unlink(missing_ok=True)
    if config:
        settings_file.write_text(json.dumps({"bos_token": config, "auto_map": config}))
    try:
        found = tok.find(tmp_path)
        assert found is not None
        words = (found.summary, *tok.for_meta(found).notes)
        words += tok.for_hf(found, vocab_size=9, max_length=9, ids={"bos": 3, "eos": 300}).notes
    except FileError as error:  # NaN, half a surrogate pair, a list instead of a mapping
        words = (str(error),)
    assert all(word.isascii() for word in words)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(MODELS), at=st.floats(0, 1), data=st.binary(max_size=6), cut=st.booleans())
def test_damaged_files_never_end_in_another_error(name: str, at: float, data: bytes, cut: bool, tmp_path: Path) -> None:
    whole = (GOLDEN / name / "tokenizer.model").read_bytes()
    place = int(at * len(whole))
    (tmp_path / "tokenizer.model").write_bytes(whole[:place] + data + (b"" if cut else whole[place + len(data) :]))
    try:
        found = tok.find(tmp_path)
        assert found is not None
        words = tok.for_hf(found, vocab_size=9, max_length=9).notes
    except SurgeryError as error:
        words = (str(error),)
    assert all(word.isascii() for word in words)


def test_planning_needs_no_other_library() -> None:
    heavy = "torch numpy transformers tokenizers sentencepiece tiktoken google.protobuf".split()
    code = f"import sys, surgery.tokenizer; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"

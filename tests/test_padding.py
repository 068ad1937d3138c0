"""Rows of padding in a vocabulary: how many there are is said, or that nobody knows, and how to leave them out."""

from __future__ import annotations

import pytest

import surgery
from surgery.conversion.inspection import describe
from surgery.formats.megatron.config import padding
from surgery.formats.padding import multiple_of, padding_notes, padding_rows
from surgery.formats.registry import open_checkpoint
from tests import oracle

GOLDEN = oracle.GOLDEN
MEGATRON = GOLDEN / "megatron" / "a_llama_legacy_tp2pp2" / "checkpoint"
NEOX = GOLDEN / "neox" / "pythia_pp1_tp2_splitbias" / "checkpoint"  # with a tokenizer of 500
KNOWN = {
    "neox/pythia_pp1_tp2_splitbias": "12 of the 512 rows of the vocabulary, padded to a multiple of 128 x tp 2, are no",
    "olmo/olmo2": "4 of the 64 rows of the vocabulary, padded to embedding_size, are no tokens and are kept",
}


def said(notes: list[str] | tuple[str, ...]) -> list[str]:
    return [note for note in notes if "rows of the vocabulary" in note]


@pytest.mark.parametrize("case", KNOWN)
def test_padding_that_the_files_tell_is_counted(case, tmp_path):
    source = GOLDEN / case / "checkpoint"
    found = open_checkpoint(source)
    tokens = found.spec.vocab - (padding_rows(found) or 0)
    (note,) = said(describe(found)["notes"])
    assert note.startswith(KNOWN[case]) and f"--vocab-size {tokens} " in note
    assert said(surgery.convert(source, tmp_path / "kept", to="hf").notes) == [note]
    cut = surgery.convert(source, tmp_path / "cut", to="hf", vocab_size=tokens)
    assert f"the vocabulary of {found.spec.vocab} rows is cut to {tokens}" in cut.notes and not said(cut.notes)
    verdict = surgery.verify(tmp_path / "kept", tmp_path / "cut").verdict
    told = found.tokenizer is not None  # else nobody knows that what OLMo left in these rows is no token's
    assert verdict == (
        "the same model (stored differently: padding of the vocabulary)" if told else "different: 2 parts"
    )


def test_where_no_tokenizer_tells_it_the_note_says_how_to(tmp_path):
    (note,) = said(describe(open_checkpoint(MEGATRON))["notes"])
    assert (
        "512 rows of the vocabulary are padded to a multiple of 128 x tp 2 (args say vocab_size 499, 13 less)" in note
    )
    assert "--tokenizer PATH" in note and "--vocab-size N" in note
    assert said(surgery.convert(MEGATRON, tmp_path / "kept", to="hf").notes) == [note]
    told = surgery.convert(MEGATRON, tmp_path / "told", to="hf", tokenizer=NEOX)
    assert said(told.notes)[0].startswith("12 of the 512 rows")
    assert not said(surgery.convert(MEGATRON, tmp_path / "all", to="hf", vocab_size=512).notes)
    assert surgery.verify(MEGATRON, tmp_path / "kept").verdict.startswith("the same model")


def test_what_cannot_have_been_padded_is_no_note(tiny_hf):
    assert multiple_of(512, 128, 2) == "padded to a multiple of 128 x tp 2"
    assert [multiple_of(*case) for case in ((513, 128), (512, 1, 1), (512, "x", 2), (512, None), (512, 0))] == [""] * 5
    args = {"make_vocab_size_divisible_by": 128, "tensor_model_parallel_size": 2}
    assert padding({**args, "vocab_size": 512}, 512) == ""
    assert padding(args, 500) == "" and padding({}, 256) == "padded to a multiple of 128"
    assert padding({**args, "vocab_size": 300}, 301) == "padded (args say vocab_size 300, 1 less)"
    assert padding({**args, "vocab_size": "x"}, 512) == "padded to a multiple of 128 x tp 2"
    assert padding_notes(open_checkpoint(tiny_hf("llama"))) == []

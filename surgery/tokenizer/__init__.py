"""The tokenizer of a checkpoint travels with it: found beside the weights, and written so that ids stay the same.

    found = find(Path("Llama-2-7b"))                              # None if there is none
    files, notes = for_hf(found, vocab_size=32000, max_length=4096)
    files, notes = for_meta(found)                                # carry(found) for every other format

Hugging Face's files go through every other format unchanged, so that they come back byte for byte.  What Meta's
programs read, `tokenizer.model`, is a SentencePiece model or a tiktoken rank file; a `tokenizer.json` is made from
either, and a rank file from the `tokenizer.json` of a Llama 3.  Nothing in a tokenizer is executed, and `notes` name
whatever was guessed or could not be carried.

    files.py          find and describe        sentencepiece.py   its protobuf -> tokenizer.json
    carry.py          write                    tiktoken.py        rank file <-> tokenizer.json
    bpe.py            merges, and the document tokenizer.json
    bytes.py          how much text a token stands for
"""

from surgery.tokenizer.carry import Carried, carry, for_hf, for_meta
from surgery.tokenizer.files import Tokenizer, find

__all__ = ["Carried", "Tokenizer", "carry", "find", "for_hf", "for_meta"]

"""A tokenizer.json, opened by the tokenizers library.

open_document(data, "SmolLM2").encode("Hello").ids
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.data.extra import needs
from surgery.errors import ConfigError, show

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NAME = "tokenizer.json"


def open_document(document: bytes, name: str) -> Tokenizer:
    """A tokenizer from the bytes of a tokenizer.json, with cutting and padding off, which files may switch on.

    Raises ConfigError if the tokenizers library does not take it.
    """
    needs("tokenizers", "encoding text")
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(document)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises plain Exceptions, and panics, which are none
        raise ConfigError(f"is no usable {NAME}: {show(str(error), 200)}", file=name) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer

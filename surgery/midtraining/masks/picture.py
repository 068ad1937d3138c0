"""Masks as a picture: a row for each attention, a square for each head, dark where queries (down) see keys (across).

data = png(drawn([pattern_of("spattention", 1024, 16)], 1024))
page = html([pattern_of("spattention", 1024, 16)], 1024)          # the same with its figures, one file
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from html import escape

import torch
from torch import Tensor

from surgery.formats.hf.hub.sparse_patterns import KINDS, Pattern, mask
from surgery.midtraining.masks.figures import figures, shrunk

SIDE, GAP, MOST = 256, 8, 16  # pixels of a head's square and between two; heads of a row
STYLE = ("body{font:16px system-ui;margin:2em auto;max-width:70em;padding:0 1em;color-scheme:light dark}"
         "img{max-width:100%;image-rendering:pixelated}")  # fmt: skip


def drawn(patterns: Sequence[Pattern], length: int) -> Tensor:
    """uint8 [height, width] of grey: white is never seen.  A row shows at most 16 heads, evenly chosen."""
    rows = []
    for pattern in patterns:
        count = min(MOST, pattern.heads)
        heads = [i * pattern.heads // count for i in range(count)]
        share = shrunk(mask(pattern, length)[heads], -(-length // SIDE))
        scale = max(1, SIDE // share.shape[-1])
        share = share.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        dark = torch.where(share > 0, 0.25 + 0.75 * share, share)  # a thin band is seen, too
        grey = torch.nn.functional.pad(1 - dark, (0, GAP, 0, GAP), value=0.85)
        rows.append(torch.cat(list(grey), 1))
    width = max(row.shape[1] for row in rows)
    whole = torch.cat([torch.nn.functional.pad(row, (0, width - row.shape[1]), value=0.85) for row in rows])
    return (whole[:-GAP, :-GAP] * 255).round().to(torch.uint8)


def png(grey: Tensor) -> bytes:
    """The file of a picture in grey [height, width]."""
    height, width = grey.shape
    lines = torch.nn.functional.pad(grey, (1, 0)).numpy().tobytes()  # each begins with its filter, none

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")


def html(patterns: Sequence[Pattern], length: int) -> str:
    """A page that needs nothing else."""
    parts = []
    for pattern in patterns:
        found, kind = figures(pattern, length), KINDS[pattern.kind]
        numbers = "".join(f", {name} {value}" for name, value in pattern.numbers)
        inferred = " No source of it was found: its definition is inferred from its name." if found.inferred else ""
        said = (f"{found.density:.1%} of the pairs of full attention, {found.distances:,} of {length:,} distances, "
                f"{found.blind:,} of {pattern.heads * length:,} queries see nothing, {found.blocks:.0%} of the blocks "
                "of 128.")  # fmt: skip
        image = base64.b64encode(png(drawn([pattern], length))).decode()
        parts.append(f"<h2>{escape(pattern.kind)}</h2><p>{escape(kind.meaning + numbers)}.{inferred}<br>{said}</p>"
                     f'<img alt="masks of {escape(pattern.kind)}" src="data:image/png;base64,{image}">')  # fmt: skip
    title = f"Attention over {length:,} tokens, {patterns[0].heads} heads"
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    legend = "<p>A square is a head: queries downwards, keys to the right.</p>"
    return f"{head}<h1>{title}</h1>{legend}{''.join(parts)}</html>\n"

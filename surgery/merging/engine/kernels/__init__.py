"""The inner loops of merging, compiled: what they make of a strip of the sources stays in a core's cache.

    linear(bits, weights, total, out)

`bits` [sources, n] are the elements as they are stored: bf16 in uint16, fp32 in uint32; where there is a base, it is
the first.  `out` [n] is of one of these, too.  Arithmetic is fp32, in the order of the torch code that each of these
stands for, and rounded once; sums over many elements are taken in fp64.
"""

from surgery.merging.engine.kernels.choices import choose, choose_by_rank, splitmix64
from surgery.merging.engine.kernels.consensus import agree, products, squares, stock, variances, varied
from surgery.merging.engine.kernels.elementwise import blend, linear
from surgery.merging.engine.kernels.numbers import magnitudes
from surgery.merging.engine.kernels.ranks import ranked, within
from surgery.merging.engine.kernels.tasks import lengths, mix, thinned
from surgery.merging.engine.kernels.words import row_sums

__all__ = [
    "agree", "blend", "choose", "choose_by_rank", "lengths", "linear", "magnitudes", "mix", "products", "ranked",
    "row_sums", "splitmix64", "squares", "stock", "thinned", "variances", "varied", "within",
]  # fmt: skip

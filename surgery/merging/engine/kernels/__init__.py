"""The inner loops of merging, compiled: what they make of a strip of the sources stays in a core's cache.

    compiled.py       numba's njit, and where its code is kept   numbers.py      elements, as stored and in fp32
    linear.py         weighted sums                              model_stock.py  products of task vectors
    sce.py            variances                                  ranks.py        order statistics
    task_vectors.py   task vectors: thinned, added               random_masks.py DARE's and DELLA's choices
    fingerprint.py    the sums of a content digest

Each stands for torch code of `merging.methods` or `merging.engine`, and gives its bits.

`bits` [sources, n] are the elements as they are stored: bf16 in uint16, fp32 in uint32; where there is a base, it is
the first.  `out` [n] is of one of these, too.  Arithmetic is fp32, in the order of the torch code that each of these
stands for, and rounded once; sums over many elements are taken in fp64.
"""

from surgery.merging.engine.kernels.fingerprint import row_sums
from surgery.merging.engine.kernels.linear import blend, linear
from surgery.merging.engine.kernels.model_stock import products, stock
from surgery.merging.engine.kernels.numbers import magnitudes
from surgery.merging.engine.kernels.random_masks import choose, choose_by_rank, splitmix64
from surgery.merging.engine.kernels.ranks import ranked, within
from surgery.merging.engine.kernels.sce import agree, squares, variances, varied
from surgery.merging.engine.kernels.task_vectors import lengths, mix, thinned

__all__ = [
    "agree", "blend", "choose", "choose_by_rank", "lengths", "linear", "magnitudes", "mix", "products", "ranked",
    "row_sums", "splitmix64", "squares", "stock", "thinned", "variances", "varied", "within",
]  # fmt: skip

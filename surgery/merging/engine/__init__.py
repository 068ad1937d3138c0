"""Merged tensors, made block by block in threads, within a memory budget.

merged.py         the lazy result                    ready.py             what a method does with a block
inputs.py         blocks of the models to be merged  pool.py              threads, memory, the door to compiled loops
cache.py          what a scan has read, for later    arithmetic.py        sums in a stated order
order_statistics.py  the n-th smallest, exactly      random_masks.py      random masks that belong to elements
sparsity.py       masks for compiled loops           pending.py           the cast that comes last, counted
kernels/          the loops themselves
"""

"""Merged tensors, made block by block in threads, within a memory budget.

merged.py         the lazy result                    inputs.py            blocks of the models to be merged
arithmetic.py     dtypes and rounding                cache.py             what a scan has read, for the next one
order_statistics.py  the n-th smallest, exactly      random_masks.py      random choices that belong to elements
keep.py           what stays of thinned vectors      kernels/             the same in compiled loops
"""

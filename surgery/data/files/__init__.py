"""Token files: `readers.py` opens any of them as a `tokens.py` source, mapped and not copied.

idx.py npy.py arrow.py dolma_rows.py    the formats
mapped.py                               arrays that lie in files
documents.py                            where documents begin
"""

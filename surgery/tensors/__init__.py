"""Lazy tensors and the files they lie in: everything answers `read(box)` and reads nothing else.

lazy.py      shape, dtype, read: slices, joins, rearrangements      extent.py       a tensor in a file
axes.py      named axes and layout patterns                         files.py        open files, ranged reads
chunked.py   a tensor of several boxes                              gather.py       rows picked and scaled
memory.py    peak memory, recycled buffers                          fingerprint.py  digests that need no order
hashing.py   splitmix64                                             random.py       numbers by their place
elsewhere.py files that lie in a bucket or on a server           in_memory.py    a tensor in memory
stamp.py     what tells a file from another
"""

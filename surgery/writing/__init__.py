"""Planned files become a folder, whole or not at all.

stream.py    blocks made by threads, written in order       sink.py       where each byte goes, with checksums
staging.py   the hidden folder, published by a rename       journal.py    what a killed run need not do again
progress.py  a bar, or nothing                    interrupt.py  SIGINT and SIGTERM, noted
atomic.py    a single file, whole or not at all             ahead.py      blocks made ahead, taken in their order
readback.py  what was written, read again                   locking.py    one run at a time
publishing.py  the last step                                renaming.py   renames that take nothing away
replaceable.py what --force may replace                     scratch.py    temporary folders
shards.py      one output by several processes
leaving.py     weights that leave a disk too small for all
"""

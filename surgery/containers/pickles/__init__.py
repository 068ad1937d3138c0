"""Pickles described, never executed: every global becomes an inert record.

describe.py   a pickle as plain data      machine.py    the opcodes' stack machine
allowed.py    what may be rebuilt         records.py    inert stand-ins
structure.py, values.py, table.py         the opcodes   pickler.py   pickles written by hand
"""

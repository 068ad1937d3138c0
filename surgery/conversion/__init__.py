"""Convert a checkpoint of any format into any other: plan, stream, read back, publish.

convert.py      plan and execution                         allowances.py   `--allow`: what may be left out
provenance.py   surgery.json beside every output           inspection.py   what a checkpoint is, for people
"""

"""Convert a checkpoint of any format into any other: plan, stream, read back, publish.

request.py   what can be asked for            report.py       plan, report, surgery.json beside every output
convert.py   plan and execution               allow.py        `--allow`: what may be left out
saving.py    what was opened and edited       inspection.py   what a checkpoint is, for people
numbers.py   NaN and overflow in what was written            workers.py      processes that share the work
state.py     an optimizer's state on its way
"""

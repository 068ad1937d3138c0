"""A mixture's experts pruned, merged or duplicated.

selection.py   which experts stay      choose.py    and which those are in a model
experts.py     and what that makes of the parts
"""

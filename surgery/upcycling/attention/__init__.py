"""Groups of attention heads as experts, in a folder that carries its own modelling code.

experts.py   parts -> parts and the config      plan.py   the files      hub/   the code that travels with it
"""

"""Recipes: whole runs as graphs of steps, resumable, on a laptop or a cluster.

recipe.py    the YAML (spec.py, problems.py)            names.py     `$name` in commands and configs
expand.py    what names mean, the runs of a matrix      graph.py     the steps in order (step.py)
keys.py      is a step done? (digests.py, record.py)    lock.py      one run of a step at a time
run.py       all steps                                  carry_out.py one of them (process.py, outputs.py)
launch.py    as jobs (scripts.py, schedulers.py)        queue.py     what became of them (selftest.py, site.py)
forecast.py  what a run would do, before it does
"""

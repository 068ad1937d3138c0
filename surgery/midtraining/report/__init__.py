"""`surgery report`: what happened in one or several runs, as one HTML file that needs no network.

page.py       the file                   verdict.py          what it says first
tables.py     its tables                 figures.py          its figures (plots.py, expert_figures.py)
curves.py     the numbers behind them
"""

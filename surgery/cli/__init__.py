"""The command line: `main.py`, and a file per command; imports everything, and nothing imports it.

main.py       the commands, a line each      group.py      which imports the one that is called, and shows errors
flags.py (plain_flags.py)   flags              command.py    flags that all have, and help in sections
terminal.py   streams, signals, logging      console.py    what is printed for people, escaped

inspect.py convert.py verify.py formats.py ask.py soup.py upcycle.py push.py pull.py      a command each
data.py (tokenize_flags.py, data_plan.py) attention.py midtrain.py eval.py report.py run.py launch.py
(recipe_commands.py)

show.py and show_answer.py, show_upcycling.py, show_verification.py, show_data.py, show_tokens.py, show_attention.py,
show_midtraining.py, show_evaluation.py, show_run.py, show_push.py print what these answer, from
the data that `--json` prints.
"""

"""Text to token files: `tokenize.py` is the run, from top to bottom.

sources.py      which files              text.py            files -> blocks of whole documents
parsing.py      blocks -> documents      bad_lines.py       what holds none
vocabulary.py   the tokenizer            tokenizer_json.py  opened
chat.py         conversations -> text    encoder.py         documents -> ids and label masks (encoded.py)
workers.py      the processes            feed.py            blocks made ahead, handed out in order
arrange.py      the order of writing     shards.py          files that grow (output_formats.py, dolma_writer.py)
prepare.py      choices -> settings.py   job.py             what makes two runs one, and how far it is
pairs.py        preferences -> batches of a run
"""

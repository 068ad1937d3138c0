"""Token files, mixtures and their order: from text to the exact batches of a run.  No torch.

Text to tokens: `tokenize.py` is the run, from top to bottom.
    sources.py        which files              text.py            files -> blocks of whole documents
    parsing.py        blocks -> documents      bad_lines.py       what holds none
    vocabulary.py     the tokenizer            tokenizer_json.py  opened
    chat.py           conversations -> text    encoder.py         documents -> ids and label masks (encoded.py)
    workers.py        the processes            feed.py            blocks made ahead, handed out in order
    arrange.py        the order of writing     shards.py          files that grow (output_formats.py, dolma_writer.py)
    prepare.py        choices -> settings.py   job.py             what makes two runs one, and how far it is

Token files: `readers.py` opens any of them as a `tokens.py` source.
    idx.py npy.py arrow.py dolma_rows.py       the formats
    mapped.py documents.py                     arrays in files, and where documents begin
    inspection.py payload_index.py             what a file is; an .idx for the files of other programs

Mixtures and batches: `plan.py` writes a plan, `batches.py` reads any step of it.
    mixture.py (strict.py) amounts.py apportion.py packing.py order.py         what, how much, in which order
    draft.py plan_file.py plan_sources.py fingerprint.py text_cache.py         from the mixture to the plan on disk
    rows.py show.py                                                            what a loop takes; what a batch holds
    megatron_order.py megatron_batches.py olmo_order.py olmo_batches.py recorded.py     the runs of other trainers
"""

"""A race on one prompt: autoregressive, standard speculative and SpecExtend one after the other, replayed side by side.

`record.py` runs and records, `page.py` makes the replay out of a record, `documents.py` reads what is raced on,
`ui.py` is the page around them.
"""

"""Visual tokenizers: images and clips to tokens and back. Imports nothing else of ours.

Reading order: `tokens` (the records and THE legend of shapes), `tokenizer` (the interface),
`blocks` and `quantizers/` (the parts), then any system, e.g. `flextok`.
"""

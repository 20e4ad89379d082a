"""Training of visual tokenizers, and their tokens as files.

Reading order: `schema` (what a config may hold), `images` and `batches` (what is trained on),
`step` (one optimiser step), `loop` (the run), `build` (config -> run); `tokenfile` is what
`flowrl tokenizer encode` writes.
"""

"""Adapters: checkpoints in the formats of those who published the methods.

Each tokenizer here has the published parameter names, reads such a checkpoint by `from_published`
(or `load_pretrained("NAME:SOURCE")`), and is an ordinary tokenizer after that. Whatever the weights
say (widths, depths) is read from them; a name that is missing or unknown is an error. Images are
[0, 1] here as everywhere; each module says what range its networks see. Reading order: `sources`,
`codebook`, then any adapter.
"""

"""From features to tokens: what a token can be, its id, and how gradients pass.

`base` is the interface. `library` wraps vector-quantize-pytorch (VQ, FSQ, LFQ); what papers need
beyond it stands in files of its own.
"""

"""What a tokenizer is worth on held-out images, and the page that compares several.

Reading order: `samples` (the images and what is known of them), `metrics`, `features` and
`perceptual` (distortion), `probes` and `ar_probe` (what the tokens carry, and what they cost),
`speed`, `evaluate` (all of it, one record), `page` (records -> a page).
"""

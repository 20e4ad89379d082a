"""The mathematics, in pure functions: torch in, torch out, nothing else known.

Reading order: `flow` (notation), `sde` and `solvers` (one step of a sampler), `tokens` (the same
for discrete decisions), `advantages`, `ratios`, `surrogates`, `regularizers`, `aggregate` (the
loss, in the order in which it is computed). `shapes` holds the few broadcasting rules that all of
them share.
"""

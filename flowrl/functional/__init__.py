"""The mathematics, in pure functions: torch in, torch out, nothing else known.

Reading order: `flow` (notation), `sde` and `solvers` (one step of a sampler), `tokens` (the same
for discrete decisions), `advantages`, `trees` and `selection`, `ratios`, `surrogates`,
`regularizers`, `weights`, `aggregate` (the loss, in the order in which it is computed). Without a
sampler's step: `matching` and `sigma_draws` (forward-process losses), `pairs` (preferences),
`neighbors`. `shapes` holds the few broadcasting rules that all of them share.
"""

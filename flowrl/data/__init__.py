"""What a training step is made of: prompts, their groups, and the seeds of all randomness.

Reading order: `prompts` (files become records), `sampler` (records and a step become a batch),
`seeds` and `noise` (a batch's samples become random numbers that nothing else can change).
"""

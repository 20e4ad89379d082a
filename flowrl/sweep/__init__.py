"""Hyper-parameter sweeps in W&B's file format, by its agents or on this machine alone.

Reading order: `spec` (a sweep's file, checked), `space` (what its distributions mean), `command`
(the command line that an agent makes of it), `hyperband` (which runs end early), `local` (the same
without an account), `table` (what is written about the results).
"""

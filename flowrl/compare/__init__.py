"""Several configs over several seeds on equal budgets, as one resumable job and one page.

Reading order: `spec` (what a comparison is), `run` (its runs as processes), `collect` (their
numbers), `page` (what is written about them).
"""

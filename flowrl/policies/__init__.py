"""Policies: a pipeline plus `rollout` and `evaluate` through one private transition."""

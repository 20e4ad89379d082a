"""Conformance checkers for authors of plug-ins: does my class do what flowrl relies on?

    from flowrl.testing import check_pipeline, check_policy, check_reward, check_tokenizer

Each takes a live object, small enough to run a few times, and raises an AssertionError (or one of
flowrl's errors) that says which rule is broken, what was expected and what arrived. The rules are
the sentences in the docstrings; the code follows their order.
Reading order: pipelines.py, policies.py, rewards.py, tokenizers.py; words.py is how they say it.
"""

from flowrl.testing.pipelines import PROMPTS, check_pipeline
from flowrl.testing.policies import check_policy
from flowrl.testing.rewards import check_reward
from flowrl.testing.tokenizers import check_tokenizer

__all__ = ["PROMPTS", "check_pipeline", "check_policy", "check_reward", "check_tokenizer"]

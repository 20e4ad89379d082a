"""Methods: the names of papers as short compositions of `flowrl.functional`.

Reading order: spec.py (what a method is), flow.py and token.py (the methods), objectives.py and
windows.py (their parts). `METHODS` is the table that a config's `method.name` looks into.
"""

from flowrl.methods.flow import dance_grpo, flow_grpo, mix_grpo
from flowrl.methods.spec import Method
from flowrl.methods.token import grpo

METHODS = {method.__name__: method for method in (flow_grpo, dance_grpo, mix_grpo, grpo)}

__all__ = ["METHODS", "Method"]

"""flowrl aligns generative models with reinforcement learning.

A method is about fifteen lines that name its parts: `flowrl.types` holds the records and the legend
of shapes, `flowrl.functional` the formulas, `flowrl.methods` their compositions, `flowrl.train` the
loop. This module stays light: it imports none of them.
"""

__version__ = "0.1.0"

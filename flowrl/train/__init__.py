"""The effects: the loop and what it calls; nothing in it is a formula of a paper."""

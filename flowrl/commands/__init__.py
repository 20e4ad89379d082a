"""The commands of the command line, one module each with a function `run`.

`flowrl.__main__` imports a module only when its command is called, so that help stays quick.
"""

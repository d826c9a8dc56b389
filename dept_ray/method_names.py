"""What a job's `method` may be: the names alone, so light that the command line offers them before anything is loaded.

What each means is a row of `rounds.methods.METHODS`.
"""

from typing import Literal, get_args

MethodName = Literal["glob", "trim", "spec", "spec-opt", "std", "act", "isolated"]

METHOD_NAMES: tuple[MethodName, ...] = get_args(MethodName)

"""The base of every error that a user can mend: its message is one line, and the command line prints just that."""


class FlowMoError(Exception):
    """Something asked of FlowMo that cannot be done; the message says what, and what to do instead."""

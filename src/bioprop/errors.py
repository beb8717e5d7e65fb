"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """A bad input, described in one sentence that names the value, the reason and what works.

    The command line prints the sentence and exits with status 2, without a traceback.
    """


class DivergenceError(UserError):
    """A loss or a weight became infinite or NaN."""

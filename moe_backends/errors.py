"""The one error type for input we will not serve."""


class Refusal(ValueError):
    """Input, environment or machine that we refuse: one sentence naming the value, the limit and what to do.

    Raised before any weight is loaded or memory is taken. The command line prints it as one line (no traceback) and exits with 2.
    """

"""The error for all that a user can correct. A caller's own mistake, such as a wrong tensor shape, is a ValueError."""


class Refusal(ValueError):
    """Input, environment or machine that is refused: one sentence with the value, the limit and what to do.

    The command line prints it as one line (no traceback) and exits with 2.
    """

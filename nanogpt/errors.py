"""A user's mistake: what was found, what was expected, what to type next."""


class UserError(ValueError):
    """One sentence for the person at the terminal; a program prints it and exits with status 2."""

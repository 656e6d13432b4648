"""A mistake of the user: what was got, what was expected, what to type next."""


class UserError(ValueError):
    """One sentence for the person at the terminal; a program prints it and exits with status 2."""

"""The one exception a person is meant to read."""


class UserError(Exception):
    """What was wrong, where, and what would be right, in one line; the command line turns it into exit 2."""

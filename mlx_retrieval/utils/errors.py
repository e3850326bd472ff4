"""Errors that the user can fix."""


class UserError(Exception):
    """A mistake that the person at the keyboard can mend; commands print it as one line and exit with 2."""

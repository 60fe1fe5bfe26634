"""The one exception that anybits raises for bad input."""


class AnybitsError(ValueError):
    """Bad input: the message is one sentence that names what is wrong and what is allowed."""

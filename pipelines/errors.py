"""The one error of this package: a mistake in the data or in what is asked of it that a message can mend."""


class DataError(ValueError):
    """What was wrong, what was found, what to do."""

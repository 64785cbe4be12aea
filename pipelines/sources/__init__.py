"""Where images come from: one file per kind of data, and the error that all of them raise."""


class DataError(ValueError):
    """A mistake in the data, or in what is asked of it: what was wrong, what was found, what to do."""

    mendable = True

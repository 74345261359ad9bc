"""The errors that a program prints in one line and ends with; others are faults of ours."""


class UserError(Exception):
    """What the user can mend: the message says what is wrong, where, and what to do. Programs print it and end."""


class ModelFilesError(UserError, ValueError):
    """A checkpoint that cannot be read or written; says which file, tensor or field."""


class TrainingError(UserError, RuntimeError):
    """Training cannot go on; nothing bad was written into parameters or checkpoints."""

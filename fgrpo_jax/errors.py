"""The errors that a program prints in one line and ends with; others are faults of ours."""


class UserError(Exception):
    """What the user can mend: the message says what is wrong, where, and what to do. Programs print it and end."""


class TrainingError(UserError, RuntimeError):
    """Training cannot go on; nothing bad was written into parameters or checkpoints."""

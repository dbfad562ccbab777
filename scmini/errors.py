"""Every error a person may meet, and the exit code that the command line gives for it.

ScminiError                  1   a fault of ours
  UsageError                 2   the command line was typed wrong
  ConfigError                2   one or more keys of the configuration are wrong
  EnvironmentProblem         3   driver, missing extra, missing file of the installation
    StoreBusy                3   another process is building this stage
  DoesNotFit                 4   out of memory, or it would be
  DataError                  5   the input data cannot be used
    RecordError              5   one row of a file is broken: names file, line and field
    StoreDamaged             5   a finished file no longer matches its manifest
  Interrupted                6   stopped by a signal, progress kept
  ServiceError               7   an outside service failed
  StageFailed                -   a stage's process ended badly; carries that process's exit code
"""

from pathlib import Path


class ScminiError(Exception):
    """Base of every error whose message is meant for the person at the keyboard."""

    exit_code = 1


class UsageError(ScminiError):
    exit_code = 2


class ConfigError(ScminiError):
    exit_code = 2


class EnvironmentProblem(ScminiError):
    exit_code = 3


class StoreBusy(EnvironmentProblem):
    """Another process is building this stage."""


class DoesNotFit(ScminiError):
    exit_code = 4


class DataError(ScminiError):
    exit_code = 5


class RecordError(DataError):
    """One row of a file is broken.

    Args:
        path: the file.
        line: 1-based line or row number.
        problem: what is wrong, naming the field, and what was expected.
    """

    def __init__(self, path: Path | str, line: int, problem: str) -> None:
        super().__init__(f"{path}, line {line}: {problem}")
        self.path, self.line, self.problem = Path(path), line, problem


class StoreDamaged(DataError):
    """A finished file no longer matches its manifest."""


class Interrupted(ScminiError):
    exit_code = 6


class ServiceError(ScminiError):
    exit_code = 7


class StageFailed(ScminiError):
    """A stage's process ended with an error.

    Args:
        stage: name of the stage, with its method if it has one.
        exit_code: the exit code of the process (5.1 of the design; 1 for a crash).
        message: what the process said last, ready to print.
    """

    def __init__(self, stage: str, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.stage, self.exit_code = stage, exit_code

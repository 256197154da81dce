"""What went wrong with a request while it ran, as its error."""

from __future__ import annotations

from kvloom.errors import RequestFailedError
from kvloom.interfaces.step import RowError, Step


def row_failure(error: RowError, cause: Exception | None) -> RequestFailedError:
    """Only this request's row failed; `cause` is the original exception where it is of this process."""
    blame = f" (plugin {error.plugin})" if error.plugin else ""
    what = error.message if error.type_name == RequestFailedError.__name__ else f"{error.type_name}: {error.message}"
    failure = RequestFailedError(what + blame)
    failure.__cause__ = cause
    return failure


def step_failure(step: Step, error: BaseException) -> RequestFailedError:
    """The step that contained it raised."""
    failure = RequestFailedError(f"step {step.step_id}, which computed this request, raised {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure

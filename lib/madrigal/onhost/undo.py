"""What to take back when an action fails: registered before it is made, undone last first."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, List, Tuple


class Undo:
    """A stack of steps back.  Only what this run creates is registered, so only that is ever removed."""

    is_interrupted = False
    """Whether the failure is one after which another run can go on."""

    def __init__(self) -> None:
        self._steps: "List[Tuple[Callable[..., Any], Tuple[Any, ...]]]" = []

    def push(self, function: "Callable[..., Any]", *arguments: "Any") -> None:
        """Register FUNCTION(*ARGUMENTS); call it before creating what it removes."""
        self._steps.append((function, arguments))

    def forget(self, function: "Callable[..., Any]", *arguments: "Any") -> None:
        """Take the newest registration of just this step off the stack."""
        for index in range(len(self._steps) - 1, -1, -1):
            if self._steps[index] == (function, arguments):
                del self._steps[index]
                return

    def unwind(self) -> "List[str]":
        """Undo everything; returns what could not be undone, a sentence each.  Not there any more is fine."""
        failures: "List[str]" = []
        while self._steps:
            function, arguments = self._steps.pop()
            try:
                function(*arguments)
            except FileNotFoundError:
                pass
            except Exception as error:
                name = getattr(function, "__name__", str(function))
                failures.append("could not undo {}{}: {}".format(name, arguments, error))
        return failures

    def clear(self) -> None:
        """Everything stays: the action has succeeded."""
        del self._steps[:]

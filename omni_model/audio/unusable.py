"""The refusal of an audio file, with a reason that can be counted. Standard library only."""

from omni_model.config import BadInput


class Unusable(BadInput):
    """An audio file that gives no clip. `reason` is one of a few words, so that a corpus can count them.

    Reasons: "unreadable", "empty", "not audio", "truncated", "damaged", "lying header", "several streams",
    "wrong rate", "too many channels", "not finite", "too short", "too long", "silent".
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[0])


def truncated(name: str, there: int, claimed: int, unit: str) -> Unusable:
    """The one sentence for every file that is shorter than it says."""
    return Unusable(f"{name} ends after {there} of {claimed} {unit}; copy it again.", "truncated")


def damaged(name: str, position: int) -> Unusable:
    """The one sentence for every file whose parts do not follow each other."""
    return Unusable(f"{name} is damaged at byte {position}; copy it again.", "damaged")


def lying(name: str, claimed: int, behind: int) -> Unusable:
    """The one sentence for every file that is longer than it says."""
    return Unusable(
        f"{name} claims {claimed} bytes, and {behind} more follow them; export it again.", "lying header"
    )


def several_streams(name: str) -> Unusable:
    """The one sentence for every file in which one recording follows another."""
    return Unusable(
        f"{name} holds several streams of sound; store each in a file of its own.", "several streams"
    )

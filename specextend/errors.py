"""Named errors of the caller's making: each says what was given, what is allowed and the way out.

The library states facts and names settings; the entry points turn every `SpecExtendError` into one line on stderr and
exit status 2 (`specextend.cli.flags.run`), and add the flag that sets what was wrong.
"""

from __future__ import annotations

from collections.abc import Mapping


class SpecExtendError(Exception):
    """Base of all errors a user can mend.

    Args:
        setting: which setting is to blame, as "tree.nodes" or "draft_model", where one is.
    """

    def __init__(self, message: str = "", *, setting: str | None = None):
        super().__init__(message)
        self.setting = setting


def describe(error: SpecExtendError, flags: Mapping[str, str]) -> str:
    """The error as one line, with the flag of the setting to blame.

    Args:
        flags: setting -> flag; settings that are not in it have none.
    """
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    flag = flags.get(error.setting or "")
    return f"{text} ({flag})" if flag and flag not in text else text


class InputError(SpecExtendError):
    """A prompt, file or record that cannot be used."""


class ConfigError(SpecExtendError):
    """A setting outside its range, or settings that contradict each other."""


class ModelError(SpecExtendError):
    """A model that is unknown, cannot be loaded, or does not fit its partner."""


class CapacityError(SpecExtendError):
    """More tokens than the model or the memory can hold."""


class WorkerError(SpecExtendError):
    """Samples that no worker could measure, or no worker left to measure them."""


class DeviceError(SpecExtendError):
    """A device that is not there, or a dtype it cannot run."""

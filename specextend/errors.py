"""Named errors of the caller's making: each says what was given, what is allowed and the way out.

The entry points turn every `SpecExtendError` into one line on stderr and exit status 2 (`specextend.cli.flags.run`).
"""


class SpecExtendError(Exception):
    """Base of all errors a user can mend."""


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

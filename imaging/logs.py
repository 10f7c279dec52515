"""Log lines: time, level, place, message. Never a name, a number of a patient, or a pixel."""

import logging
import os
import warnings

QUOTING = ("pydicom", "nibabel")  # their warnings repeat what stands in a file, a patient's name among it


def configure_logs(departments: tuple[str, ...]) -> None:
    """Let the given departments speak at FORMULARY_LOG (INFO unless told); libraries stay at WARNING."""
    if not logging.getLogger().handlers:
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s %(message)s", level=logging.WARNING)
    for library in QUOTING:
        logging.getLogger(library).propagate = False  # not its level, which pydicom sets when it is imported
        logging.getLogger(library).addHandler(logging.NullHandler())
        warnings.filterwarnings("ignore", module=library)
    for department in departments:
        logging.getLogger(department).setLevel(os.environ.get("FORMULARY_LOG", "INFO").upper())

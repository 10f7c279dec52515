"""Every error of the house: a class, a fact and a fix.

FormularyError
├── ConfigError            a decision in YAML that cannot be read
│   └── UnknownTask        no such section in params.yaml
├── DataError              a cohort, manifest or stage output that is not what it must be
│   └── WrongLabel         a truth that cannot be kept
├── ImageError             an image that cannot be answered
│   ├── TooLarge           more bytes or pixels than the limit
│   ├── TooSlow            a body that did not arrive in time
│   ├── WrongType          a content type or encoding that is not on the list
│   ├── NotAcceptable      an answer is wanted in a form that there is not
│   ├── Unreadable         bytes that are not what they say they are
│   ├── WrongModality      another kind of image than the model reads
│   ├── WrongShape         other rows, columns, orientation or spacing
│   └── NotFinite          NaN or infinity among the pixels
├── TrustError             a signature, digest, key or parity check that does not hold
├── RegistryError          a decision that cannot be taken
│   ├── UnknownVersion     no such version of the task
│   ├── NotAuthenticated   nobody says who asks, or nobody who is believed
│   ├── Forbidden          this person may not do it
│   ├── Refused            the gate said no; the reasons are in the fact
│   └── Conflict           somebody else was first
└── ServingError           an answer that cannot be given now
    ├── SiteRequired       the request does not say its site
    ├── UnknownSite        a site that is not in sites.yaml
    ├── NotApproved        no version is approved for this task at this site
    │   └── Suspended      one is, and somebody stopped it
    ├── NotReady           models are loading, or the service is stopping
    ├── DeviceMissing      an engine's device is not there, or cannot do what is asked
    ├── Overloaded         more is asked than can be answered in time, or than the site may ask
    ├── Expired            the deadline passed before the answer was there
    ├── UnknownJob         no such job of this site, or it was erased
    ├── UnknownPrediction  no such answer of this site
    ├── NoResult           a job that is not done
    └── JournalDown        the journal cannot take a row, so no answer may leave
"""

from __future__ import annotations


class FormularyError(Exception):
    """What went wrong (`fact`, one sentence) and what to do about it (`fix`, one sentence)."""

    title = "Something is wrong"

    def __init__(self, fact: str, fix: str = "") -> None:
        super().__init__(f"{fact} {fix}".strip())
        self.fact, self.fix = fact, fix


class ConfigError(FormularyError):
    """A decision in YAML that cannot be read."""

    title = "The configuration is wrong"


class UnknownTask(ConfigError):
    """No such section in params.yaml."""

    title = "No such task"


class DataError(FormularyError):
    """A cohort, manifest or stage output that is not what it must be."""

    title = "The data are not what they must be"


class WrongLabel(DataError):
    """A truth that cannot be kept."""

    title = "This label cannot be kept"


class ImageError(FormularyError):
    """An image that cannot be answered."""

    title = "This image cannot be read"


class TooLarge(ImageError):
    """More bytes or pixels than the limit."""

    title = "Too large"


class TooSlow(ImageError):
    """A body that did not arrive in time."""

    title = "The body came too slowly"


class WrongType(ImageError):
    """A content type or encoding that is not on the list."""

    title = "This type of file is not taken"


class NotAcceptable(ImageError):
    """An answer is wanted in a form that there is not."""

    title = "No answer has this form"


class Unreadable(ImageError):
    """Bytes that are not what they say they are."""

    title = "The file is damaged or of another type"


class WrongModality(ImageError):
    """Another kind of image than the model reads."""

    title = "This model reads another modality"


class WrongShape(ImageError):
    """Other rows, columns, orientation or spacing than the contract says."""

    title = "The image has another shape"


class NotFinite(ImageError):
    """NaN or infinity among the pixels."""

    title = "The image has pixels that are not numbers"


class TrustError(FormularyError):
    """A signature, digest, key or parity check that does not hold."""

    title = "This cannot be trusted"


class RegistryError(FormularyError):
    """A decision that cannot be taken."""

    title = "The registry refuses"


class UnknownVersion(RegistryError):
    """No such version of the task."""

    title = "No such version"


class NotAuthenticated(RegistryError):
    """Nobody says who asks, or nobody who is believed."""

    title = "Who asks?"


class Forbidden(RegistryError):
    """This person may not do it."""

    title = "Not allowed"


class Refused(RegistryError):
    """The gate said no; the reasons are in the fact."""

    title = "Refused by the gate"


class Conflict(RegistryError):
    """Somebody else was first."""

    title = "Somebody else was first"


class ServingError(FormularyError):
    """An answer that cannot be given now."""

    title = "No answer can be given"


class SiteRequired(ServingError):
    """The request does not say its site."""

    title = "Which site?"


class UnknownSite(ServingError):
    """A site that is not in sites.yaml."""

    title = "No such site"


class NotApproved(ServingError):
    """No version is approved for this task at this site."""

    title = "Not approved at this site"


class Suspended(NotApproved):
    """A version is approved here, and somebody stopped it."""

    title = "Suspended at this site"


class NotReady(ServingError):
    """Models are loading, or the service is stopping."""

    title = "Not ready"


class DeviceMissing(ServingError):
    """An engine's device is not there, or cannot do what is asked."""

    title = "A device is missing"


class Overloaded(ServingError):
    """More is asked than can be answered in time, or than a site may ask; come back after `retry_s`."""

    title = "Too much is asked"

    def __init__(self, fact: str, fix: str = "", retry_s: float = 1.0) -> None:
        super().__init__(fact, fix)
        self.retry_s = retry_s


class Expired(ServingError):
    """The deadline passed before the answer was there."""

    title = "Too late"


class UnknownJob(ServingError):
    """No such job of this site, or it was erased."""

    title = "No such job"


class UnknownPrediction(ServingError):
    """No such answer of this site."""

    title = "No such prediction"


class NoResult(ServingError):
    """A job that is not done."""

    title = "There is no result"


class JournalDown(ServingError):
    """The journal cannot take a row, so no answer may leave."""

    title = "The journal cannot be written"

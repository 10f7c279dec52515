"""The closed vocabularies of the house: the only place for such strings. Tasks and sites are YAML."""

from enum import StrEnum


class Modality(StrEnum):
    """What made the image, in DICOM's words (0008,0060)."""

    MR = "MR"
    CT = "CT"
    FUNDUS = "OP"
    SLIDE = "SM"
    OTHER = "OT"


class Kind(StrEnum):
    """What a task asks of an image."""

    CLASSIFICATION = "classification"
    SEGMENTATION = "segmentation"
    DETECTION = "detection"


class Corruption(StrEnum):
    """Families of what can go wrong with an image between patient and network."""

    NOISE = "noise"
    BLUR = "blur"
    GAIN = "gain"
    OFFSET = "offset"
    CONTRAST = "contrast"
    COLOUR = "colour"
    RESOLUTION = "resolution"
    COMPRESSION = "compression"
    BIAS = "bias"
    RINGING = "ringing"
    MOTION = "motion"
    OCCLUSION = "occlusion"


class Severity(StrEnum):
    """What a failed expectation does: stop the stage, or be counted."""

    CRITICAL = "critical"
    WARNING = "warning"


class Split(StrEnum):
    """What a subject is used for; one split a subject."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"
    EXTERNAL = "external"


class SiteKind(StrEnum):
    """Whether a site's images were seen in training."""

    INTERNAL = "internal"
    EXTERNAL = "external"


class Sex(StrEnum):
    """Recorded sex of a subject."""

    FEMALE = "F"
    MALE = "M"
    UNKNOWN = "unknown"


class AgeBand(StrEnum):
    """Age of a subject in years, as a band: exact ages identify people."""

    UNDER_40 = "18-39"
    UNDER_60 = "40-59"
    UNDER_75 = "60-74"
    OVER_75 = "75+"
    UNDER_18 = "0-17"
    UNKNOWN = "unknown"


class Slot(StrEnum):
    """The places a version can hold for a task."""

    CHAMPION = "champion"
    CHALLENGER = "challenger"
    PREVIOUS = "previous"


class Decision(StrEnum):
    """The kinds of ledger events."""

    KEY_TRUSTED = "key-trusted"
    KEY_REVOKED = "key-revoked"
    REGISTERED = "registered"
    RENEWED = "renewed"
    TEST_SET_USED = "test-set-used"
    REQUESTED = "requested"
    REFUSED = "refused"
    REJECTED = "rejected"
    APPROVED = "approved"
    CHALLENGED = "challenged"
    TRIAL_STARTED = "trial-started"
    TRIAL_ENDED = "trial-ended"
    CANARY_SET = "canary-set"
    ROLLED_BACK = "rolled-back"
    SUSPENDED = "suspended"
    RESUMED = "resumed"
    RETIRED = "retired"
    ALARMED = "alarmed"
    ACKNOWLEDGED = "acknowledged"
    PROFILED = "profiled"
    EXPORTED = "exported"
    INCIDENT = "incident"


class Endpoint(StrEnum):
    """What a silent trial decides by: the same findings as the champion, or the truth that comes later."""

    AGREEMENT = "agreement"
    ACCURACY = "accuracy"


class TrialVerdict(StrEnum):
    """What a silent trial says of the challenger, so far or at last."""

    RUNNING = "running"
    PASSED = "passed"
    FAILED = "failed"
    UNDECIDED = "undecided"


class Scope(StrEnum):
    """What an identity may do in the registry."""

    TRAIN = "train"
    REGISTER = "register"
    APPROVE = "approve"
    PROMOTE = "promote"
    CONTAIN = "contain"
    READ_AUDIT = "read-audit"
    KEYS = "keys"


class Spending(StrEnum):
    """How the error that a policy allows is spread over the uses of a locked test set."""

    HARMONIC = "harmonic"
    EQUAL = "equal"


class Statement(StrEnum):
    """The signed facts about a package, one a department."""

    PACKAGE = "package"
    EVALUATION = "evaluation"
    QUALIFICATION = "qualification"
    ALARMS = "alarms"


class Drift(StrEnum):
    """What the monitor says of a site's window."""

    IN_BOUNDS = "in bounds"
    DRIFT = "drift"
    TOO_FEW = "not enough cases"


class ContentType(StrEnum):
    """The bodies that a prediction can be asked with."""

    PNG = "image/png"
    DICOM = "application/dicom"
    NIFTI = "application/x-nifti"
    NPY = "application/x-npy"


class Entry(StrEnum):
    """What became of a credential: at the door, and before that in whoever's hands it was made."""

    ADMITTED = "admitted"
    NO_CREDENTIAL = "no credential"
    NOT_BELIEVED = "not believed"
    EXPIRED = "expired"
    REVOKED = "revoked"
    NO_SITE = "no site"
    OTHER_SITE = "another site"
    KEY_CREATED = "key created"
    KEY_ROTATED = "key rotated"
    KEY_REVOKED = "key revoked"


class JobKind(StrEnum):
    """What a job does that takes longer than a request may."""

    VOLUME = "volume"
    EXPLANATION = "explanation"


class JobState(StrEnum):
    """How a job goes."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Method(StrEnum):
    """How an explanation is found: by covering parts of the image, or by the gradient of the answer."""

    OCCLUSION = "occlusion"
    GRADIENT = "gradient"


class Unit(StrEnum):
    """What a control chart takes as one value: a subject, or the mean of a day where days differ."""

    SUBJECT = "subject"
    DAY = "day"


class Containment(StrEnum):
    """What an alarm does to its site."""

    NOTIFY = "notify"
    SUSPEND = "suspend"
    FALLBACK = "fallback"


class Contained(StrEnum):
    """What became of an alarm."""

    NOTIFIED = "notified"
    SUSPENDED = "suspended"
    FELL_BACK = "fell back"
    ALREADY = "suspended already"
    OTHER = "another version serves"
    NO_KEY = "no key"
    NO_POLICY = "policy not read"


class Part(StrEnum):
    """What is watched, in the words of the pages; each stream belongs to one part."""

    ACQUISITION = "acquisition"
    PIXELS = "pixels"
    EMBEDDING = "embedding"
    SCORES = "scores"
    UNCERTAINTY = "uncertainty"
    REFUSALS = "refusals"
    LATENCY = "latency"
    DISCORDANCE = "discordance"
    TRUTH = "truth"


class Judged(StrEnum):
    """What a reader, or a label that came late, says of an answer."""

    ACCEPTED = "accepted"
    REJECTED = "rejected"
    CORRECTED = "corrected"
    LABELLED = "labelled"


class Accuracy(StrEnum):
    """How far an estimate of accuracy without labels may be believed."""

    VERIFIED = "verified"
    NOT_VERIFIED = "not verified"
    NOT_VALID = "not valid"
    TOO_FEW = "not enough cases"

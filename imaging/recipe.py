"""One task's decisions: a section of params.yaml, stage by stage; misspelt keys are refused."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from imaging.preparation import Preparation
from imaging.vocabulary import Corruption, Kind, Modality


def _check_path(path: str) -> str:
    if ".." in path.split("/") or not path.endswith(".safetensors"):
        raise ValueError("name a .safetensors file, without steps upwards")
    return path


WeightsPath = Annotated[str, AfterValidator(_check_path)]


class Section(BaseModel):
    """A part of a YAML file: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Profile(Section):
    """How large an embedded cohort is. Counts are subjects."""

    internal: int = Field(ge=8)
    external: int = Field(ge=8)
    views: int = Field(ge=1, le=8)


class CohortSection(Section):
    """Where the images come from.

    Attributes:
        source: a builder (training/cohorts/<name>.py), or the folder of an import (data/<name>).
        profile: size of a built cohort; an import has its own.
        seed: of a built cohort.
    """

    source: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_./-]*$")
    profile: str = "demo"
    seed: int = 0


class SplitSection(Section):
    """Shares of the subjects of internal sites; what is left over is the locked test set.

    Attributes:
        left_out: internal sites that are kept external, to see how the model does at a site it never saw.
        local: external site -> so many of its subjects train and validate; the rest stays external.
    """

    seed: int
    train: float = Field(gt=0, lt=1)
    validation: float = Field(gt=0, lt=1)
    left_out: tuple[str, ...] = ()
    local: dict[str, int] = Field(default_factory=dict)


class CheckSection(Section):
    """What the data must be, beside what every manifest must be."""

    pixel_low: float
    pixel_high: float
    spacing_low_mm: float = Field(gt=0)
    spacing_high_mm: float = Field(gt=0)
    subjects_per_split_and_site: int = Field(ge=1)


class Architecture(Section):
    """An allow-listed architecture and its options.

    Attributes:
        name: see registry/architectures.
        channels: features of each level, fine to coarse.
        dropout: share of features left out while training.
        attention: kind of attention after each block, where the architecture has it.
        pretrained: a safetensors file of a backbone, from the root of the checkout.
        members: of an ensemble.
    """

    name: str
    channels: tuple[int, ...] = Field(default=(16, 32, 64, 96), min_length=1, max_length=6)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    attention: Literal["none", "se", "cbam"] = "none"
    pretrained: WeightsPath | None = None
    members: tuple[Architecture, ...] = ()


class AugmentationSection(Section):
    """Ranges that augmentation draws from. 0 turns a part off."""

    flip: bool = False
    shift_px: int = Field(default=0, ge=0)
    rotate_deg: float = Field(default=0.0, ge=0, le=180)
    scale: float = Field(default=0.0, ge=0, lt=0.5)
    gain: float = Field(default=0.0, ge=0, lt=1)
    offset: float = Field(default=0.0, ge=0)
    colour: float = Field(default=0.0, ge=0, lt=1)
    blur_px: float = Field(default=0.0, ge=0)
    noise: float = Field(default=0.0, ge=0)


class FitSection(Section):
    """How weights are found.

    Attributes:
        backbone_rate: learning rate of pretrained weights, as a share of the others'.
        start: weights of the same architecture to go on from, from the root of the checkout.
        schedule: of the learning rate, over all epochs.
        class_weights: `balanced` weighs each class of a classification by the inverse of its share.
        clip: largest norm of the gradient.
        patience: epochs without a better validation loss before training stops; 0 never stops early.
        mixed_precision: bfloat16 (or float16 on cuda) where the device has it.
        seed, threads, device: what the bits depend on.
    """

    architecture: Architecture
    augmentation: AugmentationSection
    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=2)
    learning_rate: float = Field(gt=0)
    start: WeightsPath | None = None
    backbone_rate: float = Field(default=1.0, gt=0, le=1)
    weight_decay: float = Field(default=1e-4, ge=0)
    schedule: Literal["one-cycle", "cosine", "constant"] = "one-cycle"
    class_weights: Literal["balanced", "none"] = "balanced"
    clip: float = Field(default=1.0, gt=0)
    patience: int = Field(default=0, ge=0)
    mixed_precision: bool = False
    seed: int
    threads: int = Field(ge=1)
    device: str = Field(default="cpu", pattern=r"^(cpu|mps|cuda(:\d+)?)$")


class CalibrateSection(Section):
    """How the operating point is frozen, on internal validation.

    Attributes:
        sensitivity: the least that the threshold must keep.
        positive: the classes that count as positive; all but the first unless told.
    """

    sensitivity: float = Field(gt=0, lt=1)
    positive: tuple[str, ...] = ()


class PackageSection(Section):
    """What the contract promises."""

    intended_use: str
    png_offset: float = 0.0
    max_batch: int = Field(ge=1, le=256)
    golden: int = Field(ge=2, le=64)
    tolerance: dict[str, float] = Field(description="engine/precision -> largest difference of a probability")


class RobustnessSection(Section):
    """Which corruptions the locked internal test set is scored under.

    Attributes:
        subjects: so many of the test set, one image each; 0 leaves robustness out.
        severities: 1 (mild) to 5.
        families: of corruption; those that augmentation also draws from are reported apart.
    """

    subjects: int = Field(default=0, ge=0)
    severities: tuple[int, ...] = (1, 3, 5)
    families: tuple[Corruption, ...] = tuple(Corruption)


class ExplanationSection(Section):
    """The audit of heat maps against lesion masks.

    Attributes:
        images: so many truly positive images with a mask; 0 leaves the audit out, and maps are withheld.
        margin: by which the share of hits must exceed every baseline's.
    """

    images: int = Field(default=0, ge=0)
    margin: float = Field(default=0.1, ge=0, le=1)


class EvaluateSection(Section):
    """How the packaged engine is scored on the locked sets."""

    engine: str
    precision: str
    confidence: float = Field(gt=0.5, lt=1)
    seed: int
    lesion_mm: tuple[float, ...] = Field(default=(), description="limits of the lesion-size subgroups, in mm")
    robustness: RobustnessSection = RobustnessSection()
    explanation: ExplanationSection = ExplanationSection()


class QualifySection(Section):
    """Which engines are held to the reference engine, on what.

    Attributes:
        engines: names, e.g. openvino/bf16; the first that passes serves unless another is faster by a tenth.
        batch_sizes: the contract's largest comes with them, and none is larger.
        images: of validation, at most; golden images and edge cases come with them.
    """

    engines: tuple[str, ...] = Field(min_length=1)
    batch_sizes: tuple[int, ...] = Field(min_length=1)
    images: int = Field(default=128, ge=4, le=4096)


class ReferenceSection(Section):
    """The drift test and the false alarms that it may raise."""

    alpha: float = Field(gt=0, lt=0.5, description="false alarms a window, over all columns")
    window: int = Field(ge=20, description="subjects; fewer is 'not enough cases'")
    repeats: int = Field(ge=10, description="null windows drawn to measure the false-alarm share")
    seed: int


class TaskSection(Section):
    """One question asked of an image, stage by stage.

    Attributes:
        classes: names of the labels 0, 1, ...
    """

    title: str
    kind: Kind
    modality: Modality
    classes: tuple[str, ...] = Field(min_length=2)
    preparation: Preparation
    cohort: CohortSection
    split: SplitSection
    check: CheckSection
    fit: FitSection
    calibrate: CalibrateSection
    package: PackageSection
    evaluate: EvaluateSection
    qualify: QualifySection
    reference: ReferenceSection

    @property
    def positive_labels(self) -> tuple[int, ...]:
        """Numbers of the positive classes."""
        named = self.calibrate.positive or self.classes[1:]
        return tuple(label for label, name in enumerate(self.classes) if name in named)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        unknown = set(self.calibrate.positive) - set(self.classes)
        if unknown or len(self.calibrate.positive) == len(self.classes):
            raise ValueError("calibrate.positive: name some, but not all, of the classes")
        if self.kind is Kind.DETECTION and len(self.classes) != 2:
            raise ValueError("a detection task has two classes: the background and the lesion")
        if self.split.train + self.split.validation >= 1:
            raise ValueError("split: train and validation leave nothing for the test set")
        return self

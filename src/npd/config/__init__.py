"""One tree of options (`sections`), and how it is read, compared and explained (`loading`)."""

from npd.config.loading import config_tree, differing_keys, flat, leaves, load_config, section_of
from npd.config.sections import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    KindOf,
    LoraConfig,
    LossConfig,
    ModelConfig,
    PackingConfig,
    PlacementConfig,
    RolloutConfig,
    ScheduleConfig,
    ScoringConfig,
    Section,
    SelectionConfig,
    StudentConfig,
    TaskConfig,
    TeacherConfig,
    TrackingConfig,
    TrainingConfig,
)  # fmt: skip

__all__ = [
    "CheckpointConfig", "Config", "DataConfig", "EvaluationConfig", "KindOf", "LoraConfig", "LossConfig", "ModelConfig",
    "PackingConfig", "PlacementConfig", "RolloutConfig", "ScheduleConfig", "ScoringConfig", "Section", "SelectionConfig",
    "StudentConfig", "TaskConfig", "TeacherConfig", "TrackingConfig", "TrainingConfig", "config_tree", "differing_keys",
    "flat", "leaves", "load_config", "section_of",
]  # fmt: skip

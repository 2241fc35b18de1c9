"""One tree of options (`sections`), and how it is read (`trees`), compared and explained (`loading`)."""

from npd.config.base import KindOf, Sampling, Section
from npd.config.harness import HarnessConfig, HarnessTaskConfig
from npd.config.loading import as_begun, config_tree, differing_keys, flat, leaves, load_config, section_of
from npd.config.models import LoraConfig, ModelConfig, StudentConfig, TeacherConfig
from npd.config.ray import RayConfig
from npd.config.sections import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LossConfig,
    PackingConfig,
    PlacementConfig,
    RolloutConfig,
    ScheduleConfig,
    ScoringConfig,
    SelectionConfig,
    TaskConfig,
    TrackingConfig,
    TrainingConfig,
)  # fmt: skip
from npd.config.trees import parse_yaml, read_yaml

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "HarnessConfig",
    "HarnessTaskConfig",
    "KindOf",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "PackingConfig",
    "PlacementConfig",
    "RayConfig",
    "RolloutConfig",
    "Sampling",
    "ScheduleConfig",
    "ScoringConfig",
    "Section",
    "SelectionConfig",
    "StudentConfig",
    "TaskConfig",
    "TeacherConfig",
    "TrackingConfig",
    "TrainingConfig",
    "as_begun",
    "config_tree",
    "differing_keys",
    "flat",
    "leaves",
    "load_config",
    "parse_yaml",
    "read_yaml",
    "section_of",
]

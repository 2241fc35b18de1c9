"""Load and save models, check that teacher and student fit each other, cut a student out of a teacher."""

from npd.models.devices import device, fast_bfloat16, resolve_dtype, use_device
from npd.models.loading import (
    check_context,
    context_length,
    directory_of,
    load_model,
    load_model_config,
    load_tokenizer,
    parameter_count,
    quiet_transformers,
    snapshot_config,
    stop_ids_of,
)
from npd.models.reading import backbone, base_model, check_compiler, check_model, head_weight, hidden_states
from npd.models.saving import ADAPTER, State, copy_state, save_model, stop_at
from npd.models.students import adapter_bytes, add_lora, cut_student, evenly_spaced
from npd.models.tokens import PROBES, Vocabulary, check_compatible, shared_vocabulary, template_difference

__all__ = [
    "ADAPTER",
    "PROBES",
    "State",
    "Vocabulary",
    "adapter_bytes",
    "add_lora",
    "backbone",
    "base_model",
    "check_compatible",
    "check_compiler",
    "check_context",
    "check_model",
    "context_length",
    "copy_state",
    "cut_student",
    "device",
    "directory_of",
    "evenly_spaced",
    "fast_bfloat16",
    "head_weight",
    "hidden_states",
    "load_model",
    "load_model_config",
    "load_tokenizer",
    "parameter_count",
    "quiet_transformers",
    "resolve_dtype",
    "save_model",
    "shared_vocabulary",
    "snapshot_config",
    "stop_at",
    "stop_ids_of",
    "template_difference",
    "use_device",
]

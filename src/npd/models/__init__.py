"""Load and save models, check that teacher and student fit each other, cut a student out of a teacher."""

from npd.models.continued import Switchable, adapter_bytes, check_adapter, with_adapters
from npd.models.devices import device, fast_bfloat16, finish_copies, move, resolve_dtype, tensors_of, to_host, use_device
from npd.models.head import AfterHead
from npd.models.layout import MODES, Layout, Mode, expected_mode, expected_reading, layout_of
from npd.models.loading import (
    check_context,
    check_weights,
    context_length,
    load_model,
    load_model_config,
    load_tokenizer,
    parameter_count,
    quiet_transformers,
    saved_dtype,
    snapshot_config,
    stop_ids_of,
)
from npd.models.memory import Activations, activations
from npd.models.proof import prove_layout
from npd.models.reading import (
    after_head_of,
    backbone,
    base_model,
    batches_for,
    check_compiler,
    head_bias,
    head_weight,
    hidden_states,
)
from npd.models.saving import ADAPTER, State, copy_state, save_adapter, save_model, stop_at
from npd.models.slots import Continuing, Slots, continuing, expected_continuing, going_on
from npd.models.sources import directory_of, name_of, whole_directory_of
from npd.models.students import add_lora, check_saved, cut_student, evenly_spaced, freeze_unread, learning_mode
from npd.models.token_bytes import Span, TokenBytes
from npd.models.tokens import PROBES, Vocabulary, check_compatible, shared_vocabulary, template_difference
from npd.models.writing import Writing, prompt_batches, ways_to_write

__all__ = [
    "ADAPTER",
    "MODES",
    "PROBES",
    "Activations",
    "AfterHead",
    "Continuing",
    "Layout",
    "Mode",
    "Slots",
    "Span",
    "State",
    "Switchable",
    "TokenBytes",
    "Vocabulary",
    "Writing",
    "activations",
    "adapter_bytes",
    "add_lora",
    "after_head_of",
    "backbone",
    "base_model",
    "batches_for",
    "check_adapter",
    "check_compatible",
    "check_compiler",
    "check_context",
    "check_saved",
    "check_weights",
    "context_length",
    "continuing",
    "copy_state",
    "cut_student",
    "device",
    "directory_of",
    "evenly_spaced",
    "expected_continuing",
    "expected_mode",
    "expected_reading",
    "fast_bfloat16",
    "finish_copies",
    "freeze_unread",
    "going_on",
    "head_bias",
    "head_weight",
    "hidden_states",
    "layout_of",
    "learning_mode",
    "load_model",
    "load_model_config",
    "load_tokenizer",
    "move",
    "name_of",
    "parameter_count",
    "prompt_batches",
    "prove_layout",
    "quiet_transformers",
    "resolve_dtype",
    "save_adapter",
    "save_model",
    "saved_dtype",
    "shared_vocabulary",
    "snapshot_config",
    "stop_at",
    "stop_ids_of",
    "template_difference",
    "tensors_of",
    "to_host",
    "use_device",
    "ways_to_write",
    "whole_directory_of",
    "with_adapters",
]

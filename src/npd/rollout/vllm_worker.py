"""What npd adds to vLLM's workers; vLLM imports it in each of their processes."""

from __future__ import annotations

from typing import Any


class TakesWeights:
    """Mixed into a worker by `worker_extension_cls`."""

    model_runner: Any

    def npd_take_weights(self, path: str) -> None:
        """Load the weights of a snapshot in place."""
        self.model_runner.reload_weights(weights_path=path)
        # On a CPU layers multiply by a packed copy of their weight. A head that is tied to the embeddings has no weights of
        # its own in the file, so nobody packs it anew, and it would go on with the old ones.
        for layer in self.model_runner.get_model().modules():
            method = getattr(layer, "quant_method", None)
            if method is not None and hasattr(layer, "cpu_linear") and hasattr(method, "tie_weights"):
                method.process_weights_after_loading(layer)

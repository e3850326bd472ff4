"""What every backbone offers. Backbones know no tasks: token ids in, token states out."""

from mlx_retrieval.backend import mx, nn


class Backbone(nn.Module):
    """Base of all backbones.

    Contract: `hidden_states(ids, lengths)` returns the last layer's states (R, L, D) in the model's dtype for ids
    (R, L) int32, right-padded, and lengths (R,) int32. Padding never changes a real token's state; the states at
    padded positions are arbitrary. Parameters keep the checkpoint's own names below `adapted`.

    BERT also takes `second`, (R,) int32: from there on, tokens are of the second text of a pair. Causal decoders also
    take `past`: see `Decoder.past`.
    """

    config: dict
    bidirectional: bool

    @property
    def adapted(self) -> nn.Module:
        """The module that adapters are relative to: its parameter names are those in `adapters.safetensors`."""
        return self

    @property
    def trunk(self) -> nn.Module:
        """The module that computes hidden states, without a language model's head."""
        return self

    @property
    def layers(self) -> list[nn.Module]:
        """The transformer blocks, first to last."""
        raise AttributeError(f"{type(self).__name__} has no layers")

    @property
    def hidden_size(self) -> int:
        return self.config["hidden_size"]

    @property
    def max_positions(self) -> int:
        """Longest text in tokens that the model has positions for."""
        return self.config.get("max_position_embeddings", 512)

    def hidden_states(self, ids: mx.array, lengths: mx.array) -> mx.array:
        raise AttributeError(f"{type(self).__name__} computes no hidden states")


def real_tokens(ids: mx.array, lengths: mx.array) -> mx.array:
    """(R, L) bool: which positions hold a real token."""
    return mx.arange(ids.shape[1])[None, :] < lengths[:, None]

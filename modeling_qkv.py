"""The paper's eight variants as one model of transformers (5.20 or newer), for use outside this repository.

"Do Transformers Need Three Projections? A Systematic Study of QKV Variants", ICML 2026. A GPT-2 style
decoder: learned positions, LayerNorm before each sublayer, exact GELU, output embedding tied to the input's.
The variants differ in which of query, key and value have a projection of their own, and in the KV heads.

export_hf.py copies this file, which imports torch and transformers alone, into each folder that it writes:

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
    prompt = tokenizer("The key is", return_tensors="pt")
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))

Parameters have the names of the training scripts' behind "transformer."; lm_head.weight is tied.
"""

from dataclasses import fields

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel, QuantizedCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.utils import can_return_tuple, logging
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

logger = logging.get_logger(__name__)

# The projections of each variant, and what they compute, in the order of their outputs. A query or value
# without a projection is the key.
PROJECTIONS = {
    "kqv": {"c_attn": "qkv"},  # QKV
    "qk": {"c_kv": "kv"},  # Q=K–V
    "kv": {"c_q": "q", "c_k": "k"},  # Q–K=V
    "k": {"c_k": "k"},  # Q=K=V
    "gqa": {"c_q": "q", "c_kv": "kv"},  # GQA
    "mqa": {"c_q": "q", "c_kv": "kv"},  # MQA
    "qgqa": {"c_q": "q", "c_k": "k"},  # Q-GQA
    "qmqa": {"c_q": "q", "c_kv": "k"},  # Q-MQA
}

# The past is called past_key_values up to transformers 5.23 and cache from 5.24 on, in a forward's arguments
# and in its output. A forward here takes both names in every version, and warns of the old one where the
# library does.
CACHE_NAME = fields(BaseModelOutputWithPast)[1].name
if CACHE_NAME == "cache":
    takes_both_cache_names = deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
else:

    def takes_both_cache_names(forward):
        return forward


# -----------------------------------------------------------------------------
# Configuration


class QKVConfig(PreTrainedConfig):
    """The architecture: `variant`, a key of PROJECTIONS, and the fields of configs/model_config_*.yaml.

    n_inner None: 4 n_embd. n_kv_groups, the KV heads, None: 1 for mqa and qmqa, else n_head. ValueError where
    the fields do not go together. config.json has the library's own names for the shape as well, such as
    num_key_value_heads, for tools that read them there.
    """

    model_type = "qkv"
    attribute_map = {
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "num_key_value_heads": "n_kv_groups",
    }
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # by Trainer.evaluate

    variant: str = "kqv"
    vocab_size: int = 50304
    n_positions: int = 2048
    n_embd: int = 1024
    n_layer: int = 20
    n_head: int = 16
    n_inner: int | None = None
    n_kv_groups: int | None = None
    dropout: float | int = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)  # first, for it sets fields that came under a name of attribute_map
        one_head = self.variant in ("mqa", "qmqa")
        if self.n_inner is None:
            self.n_inner = 4 * self.n_embd
        if self.n_kv_groups is None:
            self.n_kv_groups = 1 if one_head else self.n_head

        if self.variant not in PROJECTIONS:
            raise ValueError(f"variant: expected one of {', '.join(PROJECTIONS)}, got {self.variant!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd: expected a multiple of n_head ({self.n_head}), got {self.n_embd}")
        divisors = [n for n in range(1, self.n_head + 1) if self.n_head % n == 0]
        allowed = divisors if self.variant in ("gqa", "qgqa") else [1] if one_head else [self.n_head]
        if self.n_kv_groups not in allowed:
            expected = f"expected one of {allowed} for {self.variant} with n_head {self.n_head}"
            raise ValueError(f"n_kv_groups: {expected}, got {self.n_kv_groups}")

    def to_dict(self):
        return super().to_dict() | {name: getattr(self, own) for name, own in self.attribute_map.items()}


# -----------------------------------------------------------------------------
# Attention


def has_wide_values(cache, layer_idx):
    """Whether a cache keeps wide values whatever it is given: quantized, paged, or allocated in advance."""
    if isinstance(cache, QuantizedCache) or not isinstance(cache, Cache):
        return True
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    return layer is not None and layer.is_initialized and layer.values.shape[-1] > 0


class QKVAttention(nn.Module):
    """Causal self-attention of any variant; where the value is the key, K alone is cached."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.n_embd // config.n_head
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.num_key_value_groups = config.n_head // config.n_kv_groups  # query heads that share a KV head

        self.projections = PROJECTIONS[config.variant]
        self.value_is_key = not any("v" in outputs for outputs in self.projections.values())
        kv_width = config.n_kv_groups * self.head_dim
        self.widths = {"q": config.n_embd, "k": kv_width, "v": kv_width}
        for name, outputs in self.projections.items():
            setattr(self, name, nn.Linear(config.n_embd, sum(self.widths[letter] for letter in outputs)))
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states, attention_mask=None, cache=None, **kwargs):
        """[B, T, n_embd] -> [B, T, n_embd], and the attention weights or None; a cache grows by T tokens."""
        B, T, C = hidden_states.shape

        # Project, and split into heads: [B, heads, T, head_dim].
        states = {}
        for name, outputs in self.projections.items():
            projected = getattr(self, name)(hidden_states)
            parts = projected.split([self.widths[letter] for letter in outputs], dim=-1)
            for letter, part in zip(outputs, parts, strict=True):
                states[letter] = part.view(B, T, -1, self.head_dim).transpose(1, 2)
        key = states["k"]
        query = states.get("q", key)
        value = states.get("v", key)

        # The library's caches store a key and a value. Where the two are the same, the values get no width: K
        # is all there is in memory, and serves as both when it comes back. Quantization needs some width.
        if cache is not None and self.value_is_key:
            stored = key if has_wide_values(cache, self.layer_idx) else key[..., :0]
            key, _ = cache.update(key, stored, self.layer_idx, kwargs=kwargs)
            value = key
        elif cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)

        # Eager, SDPA, flash-attn or flex attention, as the library's attn_implementation says.
        implementation = self.config._attn_implementation
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attention(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        output = output.reshape(B, T, C).contiguous()
        return self.dropout(self.c_proj(output)), weights


# -----------------------------------------------------------------------------
# Model


class QKVMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.n_inner)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states):
        return self.dropout(self.c_proj(nn.functional.gelu(self.c_fc(hidden_states))))


class QKVBlock(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = QKVAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = QKVMLP(config)

    def forward(self, hidden_states, attention_mask=None, cache=None, **kwargs):
        attended, _ = self.attn(self.ln_1(hidden_states), attention_mask, cache, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class QKVPreTrainedModel(PreTrainedModel):
    """What the library asks of a model. It draws the paper's weights: N(0, initializer_range), biases 0."""

    config_class = QKVConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _input_embed_layer = "wte"
    _no_split_modules = ["QKVBlock"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": QKVBlock, "attentions": QKVAttention}


class QKVModel(QKVPreTrainedModel):
    """The decoder without its output embedding."""

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(QKVBlock(config, layer_idx) for layer_idx in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @takes_both_cache_names
    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, cache=None, inputs_embeds=None,
        use_cache=None, past_key_values=None, **kwargs,
    ):  # fmt: skip
        """int64 [B, T], or embeddings [B, T, n_embd] -> last_hidden_state [B, T, n_embd], and the cache.

        attention_mask [B, past + T]: 0 on padding. position_ids [B, T]: by default counted over what the mask
        does not hide, so that padding may stand on either side; in a packed row, without a mask or a past, each
        text counts from 0 and sees itself alone. ValueError for more than n_positions tokens without
        position_ids.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        length, n_positions = inputs_embeds.shape[1], self.config.n_positions

        # The past. Gradient checkpointing runs each block twice, which must not append to a cache.
        cache = cache if cache is not None else past_key_values
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            cache, use_cache = None, False
        past = cache.get_seq_length() if isinstance(cache, Cache) else 0  # a paged cache brings position_ids

        # A packed row, which brings its own positions, may be longer than its texts. A static cache counts on
        # the device, where a comparison would wait for it; generate() keeps within n_positions.
        total = past + length if isinstance(past, int) else length
        if position_ids is None and total > n_positions:
            raise ValueError(f"{total} tokens do not fit the model's n_positions, {n_positions}")

        # Only a caller with position_ids can have packed texts into a row. The mask comes before a new cache,
        # since with one the library would not look for them.
        causal_mask = create_causal_mask(self.config, inputs_embeds, attention_mask, cache, position_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        # Positions are learned, so a padded row has to start at position 0 where its text starts.
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            position_ids = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -length:]
        elif position_ids is None:
            position_ids = (torch.arange(length, device=inputs_embeds.device) + past)[None]
        hidden_states = inputs_embeds + self.wpe(position_ids)

        for block in self.h:
            hidden_states = block(hidden_states, causal_mask, cache, position_ids=position_ids, **kwargs)
        return BaseModelOutputWithPast(self.ln_f(hidden_states), cache)


class QKVForCausalLM(QKVPreTrainedModel, GenerationMixin):
    """The language model: the decoder, and its input embedding as the output embedding."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.transformer = QKVModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    @takes_both_cache_names
    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, cache=None, inputs_embeds=None,
        labels=None, use_cache=None, logits_to_keep=0, past_key_values=None, **kwargs,
    ):  # fmt: skip
        """As QKVModel.forward, -> logits [B, T, vocab_size], or those of the last logits_to_keep positions.

        labels: the inputs, shifted in here; -100 is not scored. The loss is their mean cross-entropy in nats.
        """
        cache = cache if cache is not None else past_key_values
        inputs = input_ids, attention_mask, position_ids, cache, inputs_embeds
        outputs = self.transformer(*inputs, use_cache=use_cache, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])

        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        past = getattr(outputs, CACHE_NAME)
        return CausalLMOutputWithPast(loss, logits, past, outputs.hidden_states, outputs.attentions)

    def _prepare_generated_length(self, generation_config, *args, **kwargs):
        """Texts end at n_positions: there is no embedding of a later position."""
        generation_config = super()._prepare_generated_length(generation_config, *args, **kwargs)
        # max_length counts token ids, of which a prompt of embeddings has none
        longest = self.config.n_positions - kwargs["inputs_tensor"].shape[1] + kwargs["input_ids_length"]
        if generation_config.max_length > longest:
            logger.warning(
                f"generation ends at the model's n_positions, {self.config.n_positions} tokens with the prompt"
            )
            generation_config.max_length = longest
        return generation_config

    def _get_static_cache_init_shape(self):
        """None makes a static cache wait for its first keys; made ahead of them, its values get a width."""
        if self.transformer.h[0].attn.value_is_key:
            return None
        return super()._get_static_cache_init_shape()


class QKVForSequenceClassification(GenericForSequenceClassification, QKVPreTrainedModel):
    """A linear head on the last token of a row that is not padding, for reward models and classifiers."""

    base_model_prefix = "transformer"

    def __init__(self, config):
        QKVPreTrainedModel.__init__(self, config)  # the library's would look for the decoder in its own list
        self.num_labels = config.num_labels
        self.transformer = QKVModel(config)
        self.score = nn.Linear(config.n_embd, config.num_labels, bias=False)
        self.post_init()


__all__ = ["QKVConfig", "QKVForCausalLM", "QKVForSequenceClassification", "QKVModel", "QKVPreTrainedModel"]

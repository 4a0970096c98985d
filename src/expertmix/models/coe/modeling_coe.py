"""A causal language model whose feed-forward layers are chains of experts.

In the conventions of transformers: everything that its models do, this one does. Attention is
transformers' own code, of the family that the config names; what is new is `experts.chain`.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerationMixin
from transformers.integrations.moe import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.deepseek_v2.modeling_deepseek_v2 import (
    DeepseekV2Attention,
    DeepseekV2RotaryEmbedding,
)
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeAttention, Qwen2MoeMLP
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from expertmix.experts.chain import Chain, Iteration
from expertmix.experts.chain_router import ChainRouter
from expertmix.experts.products import NAME
from expertmix.models.coe.configuration_coe import CoeConfig
from expertmix.models.coe.losses import balance_loss, z_loss

_ATTENTIONS: dict[str, type[nn.Module]] = {
    "llama": LlamaAttention,
    "olmoe": OlmoeAttention,
    "qwen2": Qwen2MoeAttention,
    "qwen3": Qwen3MoeAttention,
    "mla": DeepseekV2Attention,
}


@use_experts_implementation
class CoeExperts(nn.Module):
    """The routed experts of a layer, in one tensor per map as in every MoE of transformers."""

    def __init__(self, config: CoeConfig) -> None:
        super().__init__()
        count, width, hidden = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.num_experts = count
        self.hidden_dim = hidden
        self.intermediate_dim = width
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, H), (T, K), (T, K) to (T, H), one expert after the other."""
        given_TH = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:  # another process has it
                continue
            token, place = torch.where(top_k_index == expert)
            inner = nn.functional.linear(hidden_states[token], self.gate_up_proj[expert])
            gate, up = inner.chunk(2, dim=-1)
            found = nn.functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
            found = found * top_k_weights[token, place, None]
            given_TH.index_add_(0, token, found.to(given_TH.dtype))
        return given_TH


def _chain(config: CoeConfig) -> Chain:
    width = config.shared_expert_intermediate_size
    if width is None:
        width = config.n_shared_experts * config.moe_intermediate_size
    shared = Qwen2MoeMLP(config, intermediate_size=width) if width else None
    return Chain(config, CoeExperts(config), shared)


class CoeDecoderLayer(GradientCheckpointingLayer):
    """Attention, then a chain; or, in a dense layer, an MLP."""

    def __init__(self, config: CoeConfig, layer_idx: int) -> None:
        super().__init__()
        dense = layer_idx in (config.dense_layers or ())
        self.hidden_size = config.hidden_size
        self.self_attn = _ATTENTIONS[config.attention](config, layer_idx)
        self.mlp = Qwen2MoeMLP(config, config.intermediate_size) if dense else _chain(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = (
            LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps) if dense else None
        )

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """(B, S, H) to (B, S, H)."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        if self.post_attention_layernorm is None:
            chained: Tensor = self.mlp(hidden_states)
        else:
            chained = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return chained


class CoePreTrainedModel(PreTrainedModel):
    """What every CoE model has of transformers."""

    config: CoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CoeDecoderLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "router_logits": OutputRecorder(ChainRouter, index=0),
        "hidden_states": CoeDecoderLayer,
        "attentions": list(_ATTENTIONS.values()),
    }

    def __init__(self, config: CoeConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if config.router_float32:  # as DeepSeek's: loading in half precision leaves gates alone
            self._keep_in_fp32_modules_strict = {"iterations.*.gate.weight"}

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """The one to use where a user names none is ours."""
        found: str = super().get_correct_experts_implementation(requested_experts or NAME)
        return found

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        deviation = self.config.initializer_range
        if isinstance(module, CoeExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=deviation)
            init.normal_(module.down_proj, mean=0.0, std=deviation)
        elif isinstance(module, ChainRouter):
            init.normal_(module.weight, mean=0.0, std=deviation)
            if self.config.router_bias:
                init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, Iteration) and module.scale is not None:
            init.ones_(module.scale)


class CoeModel(CoePreTrainedModel):
    """Embeddings, layers and the last norm."""

    def __init__(self, config: CoeConfig) -> None:
        super().__init__(config)
        self.vocab_size = config.vocab_size
        # no padding_idx: where padding is the end-of-text token, it would learn nothing
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            CoeDecoderLayer(config, number) for number in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        rotary: Any = (
            DeepseekV2RotaryEmbedding if config.attention == "mla" else LlamaRotaryEmbedding
        )
        self.rotary_emb = rotary(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """As every decoder of transformers; (B, S) ids or (B, S, H) embeddings."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            places = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
            position_ids = cast(torch.LongTensor, (places + seen)[None])
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            cache=cache,
            position_ids=position_ids,
        )
        hidden_states = inputs_embeds
        rotation = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_ids=position_ids,
                cache=cache,
                use_cache=use_cache,
                position_embeddings=rotation,
                **kwargs,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), cache=cache)


class CoeForCausalLM(CoePreTrainedModel, GenerationMixin):
    """A CoE with a language-model head.

    Example:
        >>> model = CoeForCausalLM.from_pretrained(folder)
        >>> model.generate(**tokenizer("Two and two are", return_tensors="pt"))
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan: dict[str, Any] = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: CoeConfig) -> None:
        super().__init__(config)
        self.model = CoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """As every causal LM of transformers.

        With `output_router_logits`, `router_logits` holds (T, E) of each router call: all
        iterations of the first layer, then of the next; `aux_loss` is what `loss` then contains of
        the balance loss and the z-loss, times their coefficients.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        aux_loss = None
        if output_router_logits:
            aux_loss = self._router_losses(outputs.router_logits, attention_mask)
            if loss is not None:
                loss = loss + aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    def _router_losses(self, logits: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
        config = self.config
        rows = logits[0].shape[0]
        counted = mask if mask is not None and mask.numel() == rows else None  # no cache before it
        balance = balance_loss(logits, config.num_experts_per_tok, counted, scores=config.scores)
        found: Tensor = config.router_aux_loss_coef * balance
        if config.router_z_loss_coef:
            found = found + config.router_z_loss_coef * z_loss(logits, counted)
        return found

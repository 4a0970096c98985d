"""Settings of a Chain-of-Experts language model.

Knows names and defaults; no tensor.
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from expertmix.errors import ConfigError
from expertmix.experts.chain_settings import check_chain

ATTENTIONS = ("llama", "olmoe", "qwen2", "qwen3", "mla")


@strict
class CoeConfig(PreTrainedConfig):
    """Settings of `CoeForCausalLM`; those not listed mean what they mean in every model.

    In the paper's notation, CoE-C(K/N) has C `num_iterations`, K `num_experts_per_tok` in each of
    them, and N `num_experts` plus the shared ones (arXiv 2506.18945).

    Args:
        attention: `llama`; `olmoe` (queries and keys normalized as a whole); `qwen3` (by head);
            `qwen2` (biases on queries, keys, values); `mla` as in DeepSeek-V2, with the five keys
            `q_lora_rank` to `v_head_dim`.
        dense_layers: Numbers of layers that have one MLP of `intermediate_size` and do not route.
        num_iterations: C, for which there are routers.
        gating: `independent`, a router per iteration; `shared`, one that is asked anew; `fixed`,
            the first decision is kept.
        residual: `inner`, `outer`, `init`, `inner+outer` or `none`; see `experts.chain.Chain`.
        norm: `per_iteration`, or `once` as in the paper's code.
        n_shared_experts: Their widths are added up to one MLP.
        shared_expert_intermediate_size: Width of that MLP, or None for n_shared_experts times
            `moe_intermediate_size`.
        shared_experts: Run `per_iteration`, or `once` in the first.
        shared_expert_gate: Whether a sigmoid weighs them, as in Qwen2-MoE.
        iteration_scale: Whether each iteration but the first has a learned scale.
        scores: `softmax` or `sigmoid` of the logits.
        n_group, topk_group: Choose only among the experts of so many groups of so many.
        router_bias: Whether a bias that no gradient moves takes part in the selection (aux-free
            balance), per iteration and expert.
        router_float32: Keep and compute the gate in float32.
        weights_float32: Leave routing weights in float32, as Mixtral does, where the gate is not.
        norm_topk_prob: Divide the K weights by their sum.
        active_iterations: Run so many instead of C; beyond C, the last one is repeated.
        halting_threshold: A token calls no more experts once an update is smaller than this share
            of what it is added to; while training, never.
        checkpoint_iterations: Keep no activations inside an iteration; compute them again.
        router_aux_loss_coef: Of the balance loss, averaged over layers and iterations.
        router_z_loss_coef: Of the mean squared log-sum-exp of the logits.

    Raises:
        ConfigError: Settings of which no model can be made.
    """

    model_type = "coe"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {"num_local_experts": "num_experts"}
    base_model_tp_plan: ClassVar[dict[str, Any]] = {
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.shared_experts.gate_proj": "colwise",
        "layers.*.mlp.shared_experts.up_proj": "colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_ep_plan: ClassVar[dict[str, Any]] = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }
    base_model_pp_plan: ClassVar[dict[str, Any]] = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 50304
    hidden_size: int = 1024
    intermediate_size: int = 4096
    moe_intermediate_size: int = 704
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict[str, Any] | None = None

    attention: str = "llama"
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    clip_qkv: float | None = None
    q_lora_rank: int | None = None
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    dense_layers: list[int] | None = None

    num_experts: int = 64
    num_experts_per_tok: int = 4
    n_shared_experts: int = 0
    shared_expert_intermediate_size: int | None = None
    shared_expert_gate: bool = False
    scores: str = "softmax"
    n_group: int | None = None
    topk_group: int | None = None
    router_bias: bool = False
    router_float32: bool = True
    weights_float32: bool = False
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0

    num_iterations: int = 2
    gating: str = "independent"
    residual: str = "inner"
    norm: str = "per_iteration"
    shared_experts: str = "per_iteration"
    iteration_scale: bool = False
    active_iterations: int | None = None
    halting_threshold: float | None = None
    checkpoint_iterations: bool = False

    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    router_z_loss_coef: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.attention not in ATTENTIONS:
            raise ConfigError(
                f"attention={self.attention!r} is unknown: give one of {', '.join(ATTENTIONS)}"
            )
        check_chain(self)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.attention == "mla":
            self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
            self.head_dim = self.qk_rope_head_dim
        elif self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        self.dense_layers = sorted(self.dense_layers or [])
        super().__post_init__(**kwargs)

    # Names under which the attention of other families looks things up.
    @property
    def qkv_bias(self) -> bool:
        """As Qwen2-MoE asks."""
        return self.attention == "qwen2"

    @property
    def layer_types(self) -> list[str]:
        """No window slides."""
        return ["full_attention"] * self.num_hidden_layers

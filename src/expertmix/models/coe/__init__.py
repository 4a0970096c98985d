"""Chain-of-Experts as a language model of transformers: `CoeConfig` and `CoeForCausalLM`.

Importing this page tells transformers' Auto classes of model type `coe`, as every model package
does, and of the experts implementation `expertmix`, which a CoE uses unless told otherwise.

    config = CoeConfig(num_experts=64, num_experts_per_tok=4, num_iterations=2)
    model = CoeForCausalLM(config)
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from expertmix.experts.products import register_products
from expertmix.models.coe.configuration_coe import CoeConfig
from expertmix.models.coe.modeling_coe import CoeForCausalLM, CoeModel, CoePreTrainedModel

register_products()
AutoConfig.register("coe", CoeConfig, exist_ok=True)
AutoModel.register(CoeConfig, CoeModel, exist_ok=True)
AutoModelForCausalLM.register(CoeConfig, CoeForCausalLM, exist_ok=True)

__all__ = ["CoeConfig", "CoeForCausalLM", "CoeModel", "CoePreTrainedModel"]
